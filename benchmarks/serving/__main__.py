"""Run the benchmarks of serving and print, or write, ``{name: number}``."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving import engine, faults, gate, pool, registry
from safeft.models import resolve

PARTS = ("gate", "registry", "engine", "pool", "faults")


def parts(model: str, quick: bool, root: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """Each part's name and what measures it."""
    load = engine.Load.of(quick)
    return {
        # Never fewer rounds: with a tenth of them a rate of 0.06 % would be a matter of luck.
        "gate": gate.measure,
        "registry": registry.measure,
        "engine": lambda: engine.mixed_over_single(resolve(model), root / "engine", load),
        "pool": lambda: pool.measure(resolve(model), root / "pool", load),
        "faults": lambda: faults.measure(resolve(model), root / "faults"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller version of the same work")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--model", default="demo:aligned", help="base model, as a source string")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    asked = parser.parse_args()
    numbers: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, measure in parts(asked.model, asked.quick, Path(root)).items():
            if asked.only in (None, name):
                numbers |= measure()
    text = json.dumps(numbers, indent=1, allow_nan=False)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

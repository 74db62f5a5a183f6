"""Run the benchmarks of serving and print, or write, ``{name: number}``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving import gate


def parts(quick: bool) -> dict[str, Callable[[], dict[str, float]]]:
    """Each part's name and what measures it."""
    return {
        # A tenth of the rounds would make a rate of 0.03 % a matter of luck: never fewer.
        "gate": lambda: gate.measure(rounds=10_000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller version of the same work")
    parser.add_argument("--only", choices=sorted(parts(quick=True)), help="one part of it")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    asked = parser.parse_args()
    numbers: dict[str, float] = {}
    for name, measure in parts(asked.quick).items():
        if asked.only in (None, name):
            numbers |= measure()
    text = json.dumps(numbers, indent=1, allow_nan=False)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.sqsd`: what scoring costs, as ratios within one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.sqsd.measures import BARS, MEASURES
from benchmarks.sqsd.setting import Run
from cluster.cli.console import progress_bars
from safeft.models import resolve, weights_hash
from safeft.profile import SafetyProfile

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k_train.jsonl"


def main(
    quick: Annotated[bool, typer.Option(help="A smaller version of the same work.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write {name: number}.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(MEASURES)}.")] = None,
    model: Annotated[str, typer.Option(help="A model with a profile.")] = "demo:aligned",
    gsm8k: Annotated[Path, typer.Option(help="GSM8K's training rows as chat messages.")] = GSM8K,
) -> None:
    """Measure, print a table with bars, and write the numbers."""
    if unknown := set(only or ()) - set(MEASURES):
        raise typer.BadParameter(f"no measure named {', '.join(sorted(unknown))}")
    if not gsm8k.is_file():
        raise typer.BadParameter(f"{gsm8k} is missing; name the file with --gsm8k")
    with progress_bars() as progress:
        model_dir = resolve(model, progress)
        profile = SafetyProfile.for_weights(weights_hash(model_dir))
        run = Run(model_dir, profile, gsm8k, quick, progress)
        for name in only or MEASURES:
            MEASURES[name](run)
    table = Table("name", "measured", "bar", "note")
    for name, note in run.notes.items():
        value, bar = run.numbers.get(name), BARS.get(name)
        shown = "" if value is None else f"{value:.4g}"
        if value is not None and bar is not None and bar.missed_by(value):
            shown += " (missed)"
        table.add_row(name, shown, "" if bar is None else str(bar), note)
    Console(width=160).print(table)
    Console().print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if json_file is not None:
        json_file.write_text(json.dumps(run.numbers, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

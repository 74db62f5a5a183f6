"""``safeft evaluate``: how often a model refuses, and how well it does its task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json, progress_bars

if TYPE_CHECKING:
    from jobs.evaluation import Evaluation
    from jobs.pipeline import JobResult
    from jobs.restore import RestoreResult


def evaluate(
    model: Annotated[str, typer.Option(help="Base model, as a source string.")] = "demo:aligned",
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter, or directory of a tuned model.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Held-out rows: their loss is measured as well.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest held-out row.")] = 512,
    output: Annotated[Path | None, typer.Option(help="JSON file for the whole result.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure refusals on held-out harmful, benign and borderline prompts."""
    from jobs.evaluate import evaluate as run
    from safeft.data import load_rows
    from safeft.models import resolve

    with progress_bars() as progress:
        result = run(
            resolve(model, progress),
            adapter,
            held_out=load_rows(data) if data else None,
            max_tokens=max_tokens,
            output=output,
            progress=progress,
        )
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        show_evaluations({adapter.name if adapter else model: result})


def show_evaluations(results: dict[str, Evaluation]) -> None:
    """A table, one model a row: rates with their 95 % intervals."""
    from safeft.prompts import KINDS

    table = Table("model", "refuses harmful", "benign", "borderline", "task loss")
    for name, result in results.items():
        loss = result.task_loss
        rates = [str(result.refusal(kind)) for kind in KINDS]
        table.add_row(escape(name), *rates, "-" if loss is None else f"{loss:.3f}")
    out.print(table)


def show_outcome(
    result: JobResult | RestoreResult, results: dict[str, Evaluation], what: str
) -> None:
    """What a job's gate said of these evaluations, and where ``what`` it made lies."""
    show_evaluations(results)
    colour = "green" if result.gate.passed else "red"
    out.print(f"[bold {colour}]{result.status}[/]: {escape(result.gate.reason)}")
    if result.published:
        out.print(f"{what}: {escape(result.published)}")
        return
    why = ", because the dataset was not accepted" if result.gate.passed else ""
    out.print(f"not published{why}; the candidate stays in {escape(result.candidate)}")

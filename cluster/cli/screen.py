"""``safeft screen``: score a dataset and say whether it may be trained on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json, progress_bars

if TYPE_CHECKING:
    from jobs.verdict import Verdict

SHOWN_ROWS = 15
_COLOURS = {"accepted": "green", "review": "yellow", "rejected": "red"}
EXIT_CODES = {"accepted": 0, "rejected": 3, "review": 5}


class OnRisk(StrEnum):
    """The words of `jobs.policy.OnRisk`, for the command line."""

    reject = "reject"
    drop = "drop"
    review = "review"


def screen(
    data: Annotated[
        list[str],
        typer.Argument(
            help="One dataset: .jsonl and .parquet files, plain, .gz or .zst; directories, "
            "patterns and s3:// URLs of them."
        ),
    ],
    model: Annotated[str, typer.Option(help="Base model, as a source string.")] = "demo:aligned",
    profile: Annotated[
        Path | None, typer.Option(help="Safety profile; by default the model's in the cache.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where rows.parquet and verdict.json go, or are.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest row, in tokens.")] = 512,
    scorers: Annotated[int, typer.Option(min=1, help="Scoring workers.")] = 1,
    max_scorers: Annotated[
        int | None, typer.Option(min=1, help="Workers that the pool may grow to.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="A GPU for each worker.")] = False,
    on_risk: Annotated[
        OnRisk,
        typer.Option(
            help="With risky rows: reject the dataset, drop them and accept the rest, or leave "
            "it to a person's review."
        ),
    ] = OnRisk.reject,
    policy: Annotated[
        Path | None, typer.Option(help="Limits in place of the profile's, YAML.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page about the screening here, and its JSON beside it."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Score every row with SQSD and accept or reject the dataset.

    Exit code 0: accepted. 3: rejected. 5: waits for a person's review. The scores and the
    verdict are kept for the training job. A screening that was interrupted goes on when it is run
    again.
    """
    from jobs.intake import screen_file
    from jobs.policy import read_policy
    from jobs.report.screen_page import report_screening

    with progress_bars() as progress:
        verdict, where = screen_file(
            data,
            model=model,
            profile_root=profile,
            output=output,
            max_tokens=max_tokens,
            scorers=scorers,
            max_scorers=max_scorers,
            use_gpu=gpu,
            on_risk=on_risk.value,
            policy=read_policy(policy) if policy else None,
            address=address,
            progress=progress,
        )
    if report is not None:
        report_screening(
            data,
            where,
            verdict,
            report,
            model=model,
            profile_root=profile,
            max_tokens=max_tokens,
        )
    if as_json:
        written = {} if report is None else {"report": str(report)}
        print_json({**verdict.model_dump(mode="json"), "output": str(where), **written})
    else:
        show_verdict(verdict, " ".join(data), where)
        if report is not None:
            out.print(f"report: {escape(str(report))}")
    if code := EXIT_CODES[verdict.verdict]:
        raise typer.Exit(code)


def show_verdict(verdict: Verdict, data: str, where: Path) -> None:
    """The verdict, and which rows are behind it."""
    colour = _COLOURS[verdict.verdict]
    out.print(f"[bold {colour}]{verdict.verdict}[/] {escape(data)}: {verdict.reason}")
    if verdict.estimate:
        out.print(str(verdict.estimate))
    if verdict.risky_rows:
        table = Table("file", "line", "SQSD", "why", title="risky rows")
        for row in verdict.risky_rows[:SHOWN_ROWS]:
            score = "-" if row.score is None else f"{row.score:+.2f}"
            why = row.error or f"above {verdict.policy.row_threshold:+.2f}"
            table.add_row(escape(row.file), str(row.line), score, escape(why))
        out.print(table)
        if (more := verdict.risky - SHOWN_ROWS) > 0:
            out.print(f"... and {more} more")
    out.print(f"row scores: {escape(str(where / 'rows.parquet'))}")

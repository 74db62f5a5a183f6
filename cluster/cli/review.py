"""``safeft review``: a person decides on a dataset that screening left to one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cluster.cli.console import out, print_json


def review(
    directory: Annotated[Path, typer.Argument(help="The screening that waits for a decision.")],
    accept: Annotated[
        bool, typer.Option("--accept/--reject", help="May the dataset be trained on?")
    ],
    reviewer: Annotated[str, typer.Option(help="Who decides.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept with the job.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Accept or reject a dataset whose verdict is "review"; the job is then submitted again."""
    from jobs.review import record_decision
    from jobs.verdict import read_verdict

    verdict = read_verdict(directory)
    made = record_decision(directory, "accepted" if accept else "rejected", reviewer, reason)
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        out.print(f"{made.decision} by {escape(made.reviewer)}: {escape(made.reason)}")
        out.print(f"decided on: {verdict.reason}")

"""``safeft restore``: bring back the refusals that fine-tuning removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cluster.cli.console import out, print_json, progress_bars


def restore(
    spec_file: Annotated[
        Path, typer.Argument(metavar="SPEC.yaml", help="The spec of the job that tuned.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="The tuned adapter; default: the job's candidate.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the restoration goes; default: in the job's output."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train an adapter that stacks on the tuned one and makes it refuse again (SafeReAct).

    A restoration that was interrupted goes on when it is run again. Exit code 0: restored. 4: the
    safety gate failed after restoration too.
    """
    from cluster.cli.evaluate import show_evaluations
    from jobs.restore import require_restored, restore_job
    from jobs.spec import load_spec

    spec = load_spec(spec_file)
    with progress_bars() as progress:
        result = restore_job(spec, progress, adapter=adapter, output=output)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        rows = {"base model": result.base, "tuned": result.tuned, "restored": result.after}
        show_evaluations(rows)
        colour = "green" if result.gate.passed else "red"
        out.print(f"[bold {colour}]{result.status}[/]: {escape(result.gate.reason)}")
        if result.published:
            out.print(f"adapters: {escape(result.published)}")
        else:
            out.print(f"not published; the candidate stays in {escape(result.candidate)}")
    require_restored(result)

"""``safeft restore``: bring back the refusals that fine-tuning removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.console import print_json, progress_bars


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
    policy: Annotated[
        Path | None, typer.Option(help="An administrator's limits for this tenant, YAML.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train an adapter that stacks on the tuned one and makes it refuse again (SafeReAct).

    A restoration that was interrupted goes on when it is run again. Exit code 0: restored. 3: the
    dataset was not accepted, so nothing is published. 4: the safety gate failed after restoration
    too.
    """
    from jobs.policy import read_policy
    from jobs.spec import load_spec

    spec = load_spec(spec_file)
    limits = read_policy(policy) if policy else None
    # Seconds of imports, which a wrong spec need not wait for.
    from cluster.cli.evaluate import show_outcome
    from jobs.gate import require_published
    from jobs.restore import restore_job

    with progress_bars() as progress:
        result = restore_job(spec, progress, adapter=adapter, output=output, policy=limits)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        rows = {"base model": result.base, "tuned": result.tuned, "restored": result.after}
        show_outcome(result, rows, "adapters")
    require_published(
        result.name, result.gate, result.published, result.verdict, " after restoration"
    )

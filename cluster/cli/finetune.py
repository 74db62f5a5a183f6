"""``safeft finetune``: the main job, from a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.console import print_json, progress_bars


def finetune(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The job spec.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Use this seed instead of the spec's.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="An administrator's limits for this tenant, YAML.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Screen a dataset, fine-tune on it under the spec's constraints, measure refusals.

    A job that was interrupted goes on when it is run again. Exit code 0: the result may be used.
    3: the dataset was rejected, also where an override had it trained on. 4: the tuned model
    failed the safety gate. 5: the dataset waits for a person's review.
    """
    from jobs.policy import read_policy
    from jobs.spec import load_spec

    spec = load_spec(spec_file)
    limits = read_policy(policy) if policy else None
    # Seconds of imports, which a wrong spec need not wait for.
    from cluster.cli.evaluate import show_outcome
    from jobs.gate import require_published
    from jobs.pipeline import run_job

    if seed is not None:
        spec = spec.model_copy(update={"training": spec.training.model_copy(update={"seed": seed})})
    with progress_bars() as progress:
        result = run_job(spec, progress, policy=limits)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        rows = {"before": result.before, spec.name: result.after}
        show_outcome(result, rows, result.manifest.kind)
    require_published(result.name, result.gate, result.published, result.verdict)

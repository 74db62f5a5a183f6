"""What each stage does, on the existing jobs. Runs in the stage's actor.

Every stage leaves files that are whole or absent in the job's working directory, so one that was
killed is run again and finds what it had finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.artifacts import ArtifactMissing, ArtifactUnavailable
from cluster.controller.judging import evaluate, restore
from cluster.controller.publishing import publish
from cluster.controller.runner import Report, StageTask
from cluster.controller.watch import Watch
from cluster.controller.workspace import Workspace
from cluster.tenancy.cost import expected
from jobs.intake import read_dataset, screen_file
from jobs.pipeline import train_job
from jobs.verdict import iter_scores, known_score
from safeft.cache import cache_root, is_disk_full
from safeft.errors import (
    DatasetRejected,
    DatasetUnderReview,
    InputError,
    ModelError,
    ProfileError,
    SafeftError,
    SafetyGateFailed,
    ScreeningOutdated,
    SpecError,
)
from safeft.models import resolve
from safeft.progress import Progress

_SHOWN_ROWS = 100
_LONGEST = 2000
#: What a second attempt would not change: the error, its code, and the parameter to blame.
_REFUSED: tuple[tuple[type[SafeftError], str, str | None], ...] = (
    (ArtifactMissing, "file_missing", "training_file"),
    (DatasetRejected, "dataset_rejected", "training_file"),
    (DatasetUnderReview, "dataset_rejected", "training_file"),
    (SafetyGateFailed, "safety_gate_failed", None),
    (ProfileError, "no_safety_profile", "model"),
    (SpecError, "invalid_request", "method"),
    (InputError, "invalid_training_file", "training_file"),
)


def perform(task: StageTask, progress: Progress, watch: Watch | None = None) -> Report:
    """Do the task's stage; whatever goes wrong is in the report.

    Args:
        watch: gathers what the stage measures.
    """
    try:
        report = _done(task, progress, watch or Watch())
        # No number that is none: neither PostgreSQL nor a client's JSON has a place for it.
        json.dumps(report.facts, allow_nan=False)
        return report
    except Exception as error:  # noqa: BLE001  (reported; the controller decides)
        text = _placeless(str(error), task)
        if isinstance(error, DatasetUnderReview):
            text = (
                "The dataset was reviewed under another policy or profile than there is now; "
                "submit the job again"
            )
        return _failed(error, text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")


def _done(task: StageTask, progress: Progress, watch: Watch) -> Report:
    work = Workspace(task, progress, watch)
    try:
        return WORK[task.stage](work)
    except ScreeningOutdated:
        # The profile was rebuilt or safeft upgraded since: the rows are scored by those of now. An
        # administrator's yes was to the verdict of before, and is asked for again.
        shutil.rmtree(work.screening)
        return WORK[task.stage](Workspace(task, progress, watch))


def _placeless(text: str, task: StageTask) -> str:
    """A tenant reads this: where things lie on the operator's machines is none of its business."""
    settings, offer = task.settings, task.settings.base_models.get(task.base_model)
    places = {
        f"{settings.work / task.job}/": "",
        str(Path(settings.artifacts_url.removeprefix("file://"))): "artifacts",
        str(settings.home.absolute()): "home",
        str(cache_root()): "cache",
    }
    if offer is not None:
        places[str(Path(os.path.expanduser(offer.source)).absolute())] = task.base_model
        if offer.profile is not None:
            places[str(offer.profile)] = "profile"
    for place in sorted(places, key=len, reverse=True):  # some lie in others
        text = text.replace(place, places[place])
    return text


def _failed(error: Exception, message: str) -> Report:
    if isinstance(error, ArtifactUnavailable):
        return Report("unavailable", code="unavailable", message=message)
    if is_disk_full(error):  # waited for: somebody will make room
        return Report("unavailable", code="unavailable", message="the disk is full")
    if not isinstance(error, ModelError):  # that is the operator's, or the network's
        for kind, code, param in _REFUSED:
            if isinstance(error, kind):
                return Report("refused", code=code, message=message, param=param)
    return Report("fault", code=type(error).__name__, message=message)


def _validate(work: Workspace) -> Report:
    spec = work.spec()
    model_dir = resolve(spec.model, work.progress)
    train = read_dataset(spec.data.train, model_dir, spec.data.max_tokens, work.progress)
    if spec.data.validation is not None:
        read_dataset(spec.data.validation, model_dir, spec.data.max_tokens, work.progress)
    tokens = sum(len(row.input_ids) for row in train.tokenised)
    estimate = tokens * spec.training.epochs
    said = f"{len(train.rows)} rows, {tokens} tokens: about {estimate} to train on"
    price = work.task.settings.price
    if price is not None and (cost := expected(price, estimate)) is not None:
        said += f", {cost:.2f} {price.currency}"
        if price.per_gpu_hour is not None:
            said += " and the time of the workers"
    work.progress(said, 0, None)
    return Report(
        "done",
        facts={
            "rows": len(train.rows),
            "dataset_sha256": train.sha256,
            "tokens": tokens,
            "estimated_tokens": estimate,
        },
    )


def _screen(work: Workspace) -> Report:
    spec = work.spec()
    verdict, where = screen_file(
        spec.data.train,
        model=spec.model,
        profile_root=spec.profile,
        output=work.screening,
        max_tokens=spec.data.max_tokens,
        on_risk=spec.screening.on_risk,
        policy=work.task.policy.screening,
        limits=spec.screening.policy,
        progress=work.progress,
    )
    scores = (score for row in iter_scores(where) if (score := known_score(row)) is not None)
    work.watch.scored(scores, verdict.policy.row_threshold)
    facts = verdict.model_dump(mode="json")
    facts["risky_rows"] = facts["risky_rows"][:_SHOWN_ROWS]
    facts["reason"] = verdict.reason
    facts["verdict_sha256"] = verdict.digest()
    if verdict.verdict == "accepted":
        return Report("done", facts=facts)
    if verdict.verdict == "review":
        return Report("review", message=verdict.reason, facts=facts)
    report = f"/v1/safety/jobs/{work.task.job}/screening"
    message = f"The dataset was {verdict.verdict}: {verdict.reason}. Which rows: {report}"
    return Report(
        "refused", code="dataset_rejected", message=message, param="training_file", facts=facts
    )


def _train(work: Workspace) -> Report:
    spec = work.spec()
    trained = train_job(
        spec,
        work.progress,
        screening=work.screening,
        policy=work.task.policy.screening,
        on_step=work.watch.step,
    )
    manifest = trained.tuned.manifest
    return Report(
        "done",
        facts={
            "steps": manifest.steps,
            "final_loss": manifest.final_loss,
            "trained_tokens": manifest.label_tokens * spec.training.epochs,
            "safety_rows": trained.data.safety_rows,
            "answer_rows": trained.data.answer_rows,
            "run": manifest.run,
            "seconds": manifest.seconds,
        },
    )


WORK: dict[str, Callable[[Workspace], Report]] = {
    "validating": _validate,
    "screening": _screen,
    "training": _train,
    "evaluating": evaluate,
    "restoring": restore,
    "publishing": publish,
}

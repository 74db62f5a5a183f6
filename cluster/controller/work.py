"""What each stage does, on the existing jobs. Runs in the stage's actor.

Every stage leaves files that are whole or absent in the job's working directory, so one that was
killed is run again and finds what it had finished.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.artifacts import (
    ArtifactMissing,
    ArtifactUnavailable,
    fetch,
    open_store,
    put_file,
)
from cluster.artifacts.names import model_prefix
from cluster.controller.gate import policy_gate
from cluster.controller.runner import Report, StageTask
from cluster.controller.watch import Watch
from cluster.job_spec import finetune_spec
from cluster.provenance import PROVENANCE, Signed, SigningKey, Statement, checked_files
from jobs.pipeline import JobResult, read_dataset, run_job, screen_file, train_job
from jobs.spec import FinetuneSpec
from jobs.verdict import iter_scores, known_score
from safeft import __version__
from safeft.cache import is_disk_full, sha256_file, write_whole
from safeft.errors import (
    DatasetRejected,
    InputError,
    MeasurementError,
    ModelError,
    ProfileError,
    SafeftError,
    SpecError,
)
from safeft.models import resolve
from safeft.progress import Progress

_SHOWN_ROWS = 100
_LONGEST = 2000
#: What a second attempt would not change: the error, its code, and the parameter to blame.
_REFUSED: tuple[tuple[type[SafeftError], str, str], ...] = (
    (ArtifactMissing, "file_missing", "training_file"),
    (DatasetRejected, "dataset_rejected", "training_file"),
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
        report = WORK[task.stage](_Job(task, progress, watch or Watch()))
        # No number that is none: neither PostgreSQL nor a client's JSON has a place for it.
        json.dumps(report.facts, allow_nan=False)
        return report
    except Exception as error:  # noqa: BLE001  (reported; the controller decides)
        # A tenant reads this: where the working directory lies is none of its business.
        text = str(error).replace(f"{task.settings.work / task.job}/", "")
        return _failed(error, text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")


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


class _Job:
    """The job's working directory, and its spec."""

    def __init__(self, task: StageTask, progress: Progress, watch: Watch) -> None:
        self.task, self.progress, self.watch = task, progress, watch
        self.offer = task.settings.base_models[task.base_model]
        self.store = open_store(task.settings.artifacts_url)
        self.root = task.settings.work / task.job
        self.root.mkdir(parents=True, exist_ok=True)
        self.screening = self.root / "screening"

    def spec(self) -> FinetuneSpec:
        """The spec, with the tenant's files beside it: exactly the bytes that were uploaded."""
        task = self.task
        train = fetch(
            self.store,
            task.training_file.key,
            self.root / "training-file",
            task.training_file.sha256,
        )
        validation = None
        if (file := task.validation_file) is not None:
            validation = fetch(self.store, file.key, self.root / "validation-file", file.sha256)
        return finetune_spec(
            task.request,
            name=task.job,
            offer=self.offer,
            train=train,
            validation=validation,
            output=self.root / "output",
        )


def _validate(job: _Job) -> Report:
    spec = job.spec()
    model_dir = resolve(spec.model, job.progress)
    train = read_dataset(spec.data.train, model_dir, spec.data.max_tokens, job.progress)
    if spec.data.validation is not None:
        read_dataset(spec.data.validation, model_dir, spec.data.max_tokens, job.progress)
    tokens = sum(len(row.input_ids) for row in train.tokenised)
    estimate = tokens * spec.training.epochs
    job.progress(f"{len(train.rows)} rows, {tokens} tokens: about {estimate} to train on", 0, None)
    return Report(
        "done",
        facts={
            "rows": len(train.rows),
            "dataset_sha256": train.sha256,
            "tokens": tokens,
            "estimated_tokens": estimate,
        },
    )


def _screen(job: _Job) -> Report:
    spec = job.spec()
    verdict, where = screen_file(
        spec.data.train,
        model=spec.model,
        profile_root=spec.profile,
        output=job.screening,
        max_tokens=spec.data.max_tokens,
        progress=job.progress,
    )
    scores = (score for row in iter_scores(where) if (score := known_score(row)) is not None)
    job.watch.scored(scores, verdict.policy.row_threshold)
    facts = verdict.model_dump(mode="json")
    facts["risky_rows"] = facts["risky_rows"][:_SHOWN_ROWS]
    facts["reason"] = verdict.reason
    if verdict.verdict == "accepted":
        return Report("done", facts=facts)
    report = f"/v1/safety/jobs/{job.task.job}/screening"
    message = f"The dataset was {verdict.verdict}: {verdict.reason}. Which rows: {report}"
    return Report(
        "refused", code="dataset_rejected", message=message, param="training_file", facts=facts
    )


def _train(job: _Job) -> Report:
    spec = job.spec()
    trained = train_job(spec, job.progress, screening=job.screening, on_step=job.watch.step).tuned
    manifest = trained.manifest
    return Report(
        "done",
        facts={
            "steps": manifest.steps,
            "final_loss": manifest.final_loss,
            "trained_tokens": manifest.label_tokens * spec.training.epochs,
            "run": manifest.run,
            "seconds": manifest.seconds,
        },
    )


def _evaluate(job: _Job) -> Report:
    result = run_job(job.spec(), job.progress, screening=job.screening)
    failures = [] if result.gate.passed else [result.gate.reason]
    failures += policy_gate(result.after, job.task.policy)
    facts: dict[str, Any] = {
        "passed": not failures,
        "reason": "; ".join(failures) or result.gate.reason,
        "before": _rates(result, "before"),
        "after": _rates(result, "after"),
        "task_loss": result.after.task_loss,
        "bound": result.after.bound,
    }
    if not failures:
        return Report("done", facts=facts)
    message = f"The safety gate failed: {facts['reason']}; nothing is published"
    return Report("below_gate", code="safety_gate_failed", message=message, facts=facts)


def _rates(result: JobResult, when: str) -> dict[str, dict[str, float]]:
    evaluation = result.before if when == "before" else result.after
    found = {kind: evaluation.refusal(kind) for kind in evaluation.refusals["sets"]}
    return {
        kind: {"refused": rate.hits, "asked": rate.n, "value": rate.value}
        for kind, rate in found.items()
    }


def _publish(job: _Job) -> Report:
    task = job.task
    result = run_job(job.spec(), job.progress, screening=job.screening)
    if result.published is None:
        raise MeasurementError("the model that passed the gate is not there any more")
    source = Path(result.published)
    staged = job.root / "published"
    if not staged.exists():
        partial = job.root / "publishing"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        statement = Statement(
            model=_model_name(task),
            job=task.job,
            base_model=task.base_model,
            base_weights=result.manifest.identity.base_weights,
            dataset_sha256=result.verdict.data_sha256,
            profile=result.verdict.profile,
            files=checked_files(partial),
            facts={stage: task.facts[stage] for stage in ("validating", "training", "evaluating")},
            code_version=__version__,
            published_at=time.time(),
        )
        signed = SigningKey.load_or_create(task.settings.signing_key).sign(statement)
        write_whole(partial / PROVENANCE, signed.model_dump_json())
        partial.rename(staged)
    signed = Signed.model_validate_json((staged / PROVENANCE).read_bytes())
    prefix = model_prefix(task.tenant, task.job)
    for path in sorted(staged.iterdir()):
        job.progress(f"storing {path.name}", 0, None)
        put_file(job.store, f"{prefix}/{path.name}", path)
    return Report(
        "done",
        facts={
            "model": Statement.model_validate_json(signed.statement).model,
            "kind": result.manifest.kind,
            "prefix": prefix,
            "manifest_sha256": sha256_file(staged / "manifest.json"),
            "provenance": signed.model_dump(),
        },
    )


def _model_name(task: StageTask) -> str:
    """As OpenAI names them; the job's number in it makes it unique."""
    suffix = task.request["suffix"] or ""
    return f"ft:{task.base_model}:{task.tenant_name}:{suffix}:{task.job.rpartition('-')[2][:12]}"


#: Restoring is not here: a failed gate ends the job until SafeReAct joins (`Rules.restores`).
WORK: dict[str, Callable[[_Job], Report]] = {
    "validating": _validate,
    "screening": _screen,
    "training": _train,
    "evaluating": _evaluate,
    "publishing": _publish,
}

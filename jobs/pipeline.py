"""The main job: validate, screen, train, evaluate, decide. What `safeft finetune` runs.

Each stage writes a directory or file of its own that is whole or absent and bound to its inputs,
so a job that stopped anywhere is started again with the same command and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from jobs.evaluate import evaluate
from jobs.evaluation import Evaluation
from jobs.finetune import FinetuneResult, Manifest, finetune
from jobs.finetune.parts import needed_parts
from jobs.finetune.telemetry import OnStep, unheard
from jobs.gate import Gate, safety_gate
from jobs.intake import Screened, open_job, read_data, screen_data
from jobs.own_rows import own_parts
from jobs.policy import PolicyFile
from jobs.publication import JOB_FILE, publish_measured
from jobs.review import Decision, is_accepted, require_accepted
from jobs.runtime import embedded_ray
from jobs.spec import DataSpec, FinetuneSpec
from jobs.training_rows import training_rows
from jobs.verdict import Verdict
from safeft.cache import write_whole
from safeft.data import Row
from safeft.progress import Progress, silent

TRAINING, EVALUATION = "training", "evaluation.json"


class JobResult(BaseModel):
    """Everything a finished job leaves, beside the weights themselves.

    ``review``: the decision of a person, where screening left the dataset to one.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    status: Literal["succeeded", "gate_failed"]
    candidate: str
    published: str | None
    verdict: Verdict
    review: Decision | None
    override_reason: str | None
    manifest: Manifest
    before: Evaluation
    after: Evaluation
    gate: Gate


def run_job(
    spec: FinetuneSpec,
    progress: Progress = silent,
    *,
    screening: Path | None = None,
    policy: PolicyFile | None = None,
) -> JobResult:
    """Run one fine-tuning job from its spec to a verdict on the tuned model.

    Args:
        screening: where the screening of the data is, or goes; default: the cache.
        policy: an administrator's limits for this tenant, in place of the profile's.

    Raises:
        InputError: the data or the spec is wrong.
        ProfileError: the base model has no complete safety profile.
        DatasetRejected: screening or a reviewer rejected the data and the spec overrides nothing.
        DatasetUnderReview: screening left the data to a reviewer, who has not decided.
        TrainingError, ModelError, MeasurementError: the stage that failed.
    """
    trained = train_job(spec, progress, screening=screening, policy=policy)
    return _judge(spec, trained, progress)


@dataclass(frozen=True)
class Trained:
    """A trained job that has not been judged. ``data``: with the numbers of own rows."""

    screened: Screened
    tuned: FinetuneResult
    model_dir: Path
    before: Evaluation
    held_out: Sequence[Row] | None
    data: DataSpec


def train_job(
    spec: FinetuneSpec,
    progress: Progress = silent,
    *,
    screening: Path | None = None,
    policy: PolicyFile | None = None,
    on_step: OnStep = unheard,
) -> Trained:
    """The first half of `run_job`, which finds it done when it is called afterwards.

    Args:
        on_step: see `finetune`.
    """
    opened = open_job(spec, progress, policy)
    model_dir, profile = opened.model_dir, opened.profile
    parts = needed_parts(spec, profile)
    profile.verify(own_parts(spec.data))
    data = read_data(spec, model_dir, progress)
    with embedded_ray(spec.distributed.address):
        found = screen_data(spec, opened, data.train, progress, screening)
        if spec.screening.override_reason is None:
            require_accepted(data.train.path, found.verdict, found.where, found.review)
        used = training_rows(
            spec, data.train.tokenised, found.verdict, found.where, profile, model_dir
        )
        tuned = finetune(
            spec.model_copy(update={"data": used.data}),
            rows=used.rows,
            weights=used.weights,
            model_dir=model_dir,
            profile=parts,
            output=spec.output / TRAINING,
            file_sha256=data.train.sha256,
            progress=progress,
            on_step=on_step,
        )
    return Trained(found, tuned, model_dir, opened.before, data.held_out, used.data)


def _judge(spec: FinetuneSpec, trained: Trained, progress: Progress) -> JobResult:
    verdict, review = trained.screened.verdict, trained.screened.review
    tuned, before = trained.tuned, trained.before
    after = evaluate(
        trained.model_dir,
        tuned.weights,
        held_out=trained.held_out,
        max_tokens=spec.data.max_tokens,
        output=spec.output / EVALUATION,
        progress=progress,
    )
    gate = safety_gate(before, after)
    # Rejected data may be trained on for a stated reason, but what comes of it is not published.
    publish = gate.passed and is_accepted(verdict, review)
    published = spec.output / tuned.manifest.kind
    result = JobResult(
        name=spec.name,
        status="succeeded" if gate.passed else "gate_failed",
        candidate=str(tuned.weights),
        published=str(published) if publish else None,
        verdict=verdict,
        review=review,
        override_reason=spec.screening.override_reason,
        manifest=tuned.manifest,
        before=before,
        after=after,
        gate=gate,
    )
    if publish:
        publish_measured(tuned.weights, published, after, weights=".", name=JOB_FILE, result=result)
    write_whole(spec.output / JOB_FILE, result.model_dump_json(indent=1))
    return result

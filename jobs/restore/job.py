"""`safeft restore`: what a fine-tuning job made, restored, measured, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.evaluate import evaluate
from jobs.finetune.telemetry import OnStep, unheard
from jobs.intake import Opened, Screened, open_job, read_data, screen_data
from jobs.pipeline import EVALUATION, TRAINING
from jobs.policy import PolicyFile
from jobs.publication import RESTORE_FILE, publish_measured, require_trained_on
from jobs.restore.result import Restoration, RestoreResult, restoration_gate
from jobs.restore.run import CANDIDATE, PARTS, PUBLISHED, STACKED, restore
from jobs.review import is_accepted
from jobs.runtime import embedded_ray
from jobs.spec import FinetuneSpec
from jobs.verdict import known_score, read_scores
from safeft.cache import write_whole
from safeft.data import Row
from safeft.errors import InputError
from safeft.models.directory import is_whole_model
from safeft.progress import Progress, silent
from safeft.screen_policy import is_risky


def restore_job(
    spec: FinetuneSpec,
    progress: Progress = silent,
    *,
    adapter: Path | None = None,
    output: Path | None = None,
    screening: Path | None = None,
    policy: PolicyFile | None = None,
) -> RestoreResult:
    """Restore what a fine-tuning job made, and measure it. What `safeft restore` runs.

    Args:
        spec: the job's own spec: its model, data and section ``restore`` count.
        adapter: the tenant's adapter; None: the job's candidate.
        output: where the restoration goes; None: ``restoration`` in the job's output.
        screening: where the screening of the data is, or goes; default: the cache.
        policy: an administrator's limits for this tenant, in place of the profile's.

    Raises:
        InputError: there is no such adapter, it is a whole model, or nothing says what it was
            trained on; no row is left.
        DatasetRejected: it was trained on other rows than may be trained on now.
        ProfileError: the base model's safety profile lacks something; it says what makes it.
        TrainingError, ModelError, MeasurementError: the stage that failed.
    """
    trained = train_restoration(
        spec, progress, adapter=adapter, output=output, screening=screening, policy=policy
    )
    return _judge(spec, trained, progress)


@dataclass(frozen=True)
class TrainedRestoration:
    """A restoration that has not been judged: ``<output>/candidate``."""

    opened: Opened
    screened: Screened
    held_out: Sequence[Row] | None
    adapter: Path
    output: Path
    manifest: Restoration


def train_restoration(
    spec: FinetuneSpec,
    progress: Progress = silent,
    *,
    adapter: Path | None = None,
    output: Path | None = None,
    screening: Path | None = None,
    policy: PolicyFile | None = None,
    on_step: OnStep = unheard,
) -> TrainedRestoration:
    """The first half of `restore_job`, which finds it done when it is called afterwards.

    Args:
        on_step: see `finetune`.
    """
    adapter = adapter or _candidate(spec)
    output = output or spec.output / "restoration"
    if is_whole_model(adapter):
        raise InputError(
            f"{adapter} is a whole model; restorations stack on LoRA adapters: tune with lora"
        )
    if not adapter.is_dir():
        raise InputError(f"{adapter}: there is no adapter; run the job first or give --adapter")
    opened = open_job(spec, progress, policy)
    model_dir, profile = opened.model_dir, opened.profile
    profile.verify(PARTS)
    data = read_data(spec, model_dir, progress)
    with embedded_ray(spec.distributed.address):
        found = screen_data(spec, opened, data.train, progress, screening)
        require_trained_on(adapter, spec.output, found.verdict)
        limits = found.verdict.policy
        risky = [is_risky(known_score(one), limits) for one in read_scores(found.where)]
        manifest = restore(
            spec,
            adapter=adapter,
            domain=[r for r, bad in zip(data.train.tokenised, risky, strict=True) if not bad],
            model_dir=model_dir,
            profile=profile,
            output=output,
            progress=progress,
            on_step=on_step,
        )
    return TrainedRestoration(opened, found, data.held_out, adapter, output, manifest)


def _candidate(spec: FinetuneSpec) -> Path:
    return spec.output / TRAINING / "adapter"


def _judge(spec: FinetuneSpec, trained: TrainedRestoration, progress: Progress) -> RestoreResult:
    output, found = trained.output, trained.screened
    # The job has measured its own candidate.
    own = trained.adapter == _candidate(spec)
    measured = [
        evaluate(
            trained.opened.model_dir,
            weights,
            held_out=trained.held_out,
            max_tokens=spec.data.max_tokens,
            output=file,
            progress=progress,
        )
        for weights, file in (
            (trained.adapter, spec.output / EVALUATION if own else output / "before.json"),
            (output / CANDIDATE / STACKED, output / "after.json"),
        )
    ]
    gate = restoration_gate(trained.opened.before, *measured)
    # As of the job itself: what comes of data that were not accepted is not published.
    publish = gate.passed and is_accepted(found.verdict, found.review)
    candidate, published = output / CANDIDATE, output / PUBLISHED
    result = RestoreResult(
        name=spec.name,
        status="restored" if gate.passed else "gate_failed",
        candidate=str(candidate),
        published=str(published) if publish else None,
        verdict=found.verdict,
        review=found.review,
        manifest=trained.manifest,
        base=trained.opened.before,
        tuned=measured[0],
        after=measured[1],
        gate=gate,
    )
    if publish:
        after = result.after
        publish_measured(
            candidate, published, after, weights=STACKED, name=RESTORE_FILE, result=result
        )
    write_whole(output / RESTORE_FILE, result.model_dump_json(indent=1))
    return result

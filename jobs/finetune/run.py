"""`finetune`: one run from rows to finished weights, resumed where an earlier one stopped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import ray

from jobs.finetune import checkpoints
from jobs.finetune.batches import RowTable, batch_plan, rows_to_table
from jobs.finetune.fit import run_workers
from jobs.finetune.job import WorkerJob
from jobs.finetune.manifest import (
    Identity,
    Kind,
    Manifest,
    identify,
    libraries,
    read_manifest,
    weights_kind,
)
from jobs.finetune.parts import absolute
from jobs.finetune.telemetry import (
    Mailbox,
    OnStep,
    StepMetrics,
    read_metrics,
    unheard,
    write_metrics,
)
from jobs.runtime import embedded_ray
from jobs.spec import FinetuneSpec
from safeft.cache import locked, publish_dir, sha256_file, write_whole
from safeft.constraints import ProfileFiles
from safeft.data import TokenisedRow
from safeft.errors import RowErrors, SpecError, TrainingError
from safeft.progress import Progress, silent

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
_IDENTITY = "run.json"


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        weights: directory with manifest.json and a LoRA adapter or a whole model.
        steps: the metrics of every step, in order (loss, penalties, rates).
    """

    weights: Path
    manifest: Manifest
    steps: list[StepMetrics]

    @property
    def losses(self) -> list[float]:
        """The training loss of every step."""
        return [metrics["loss"] for metrics in self.steps]


def finetune(
    spec: FinetuneSpec,
    *,
    rows: Sequence[TokenisedRow],
    model_dir: Path,
    profile: ProfileFiles,
    output: Path,
    weights: Sequence[float] | None = None,
    file_sha256: str | None = None,
    progress: Progress = silent,
    on_step: OnStep = unheard,
) -> FinetuneResult:
    """Train on `rows` under the spec's constraints; leave an adapter or a model in `output`.

    Ray is started for the run if this process has none. A run that was interrupted goes on from
    its last whole checkpoint when it is started again with the same output; a finished one is
    returned at once. On several machines `model_dir`, `profile` and `output` are on a file
    system that all of them share.

    Args:
        rows: tokenised rows; their order matters only together with the seed.
        model_dir: the base model's directory.
        profile: the parts of the base model's safety profile that the constraints need.
        weights: of each row, what its loss is multiplied with; each step's loss is then the
            weighted mean. None: all rows count alike.
        file_sha256: of the file that the rows were read from, for the manifest.
        progress: told the phase and its seconds, and while training the step.
        on_step: told the metrics of each step that this call trains.

    Raises:
        SpecError: `output` holds another run, or the machines cannot run this spec.
        RowErrors: a row has nothing to train on.
        ProfileError: a constraint lacks something, or a part was made for other weights.
        TrainingError: training diverged, or workers were lost too often.
        ModelError: the base model cannot be loaded or adapted.
    """
    output.mkdir(parents=True, exist_ok=True)
    output, model_dir = output.absolute(), model_dir.absolute()
    arrow = rows_to_table(rows, weights)
    table = RowTable(arrow)
    _check_rows(spec, rows, table)
    profile = absolute(profile)
    identity = identify(spec, table, model_dir, profile)
    for constraint in spec.constraints:
        constraint.build(profile)  # what is missing is found here rather than on the workers
    with locked(output / "run", progress):
        if (finished := _finished(output, identity)) is not None:
            return finished
        _bind(output, identity)
        with embedded_ray(spec.distributed.address):
            job = WorkerJob(
                spec=spec,
                rows=ray.put(arrow),
                model_dir=model_dir,
                profile=profile,
                run=identity.run_hash(),
                resume_from=_resume_from(output, identity, progress),
                mailbox=Mailbox.remote(),
            )
            started = time.perf_counter()
            result = run_workers(job, output, METRICS, progress, on_step)
            seconds = time.perf_counter() - started
        return _publish(spec, identity, table, file_sha256, result, seconds, output)


def _check_rows(spec: FinetuneSpec, rows: Sequence[TokenisedRow], table: RowTable) -> None:
    empty = [
        (row.line, "labels", "has no token to train on")
        for row, count in zip(rows, table.label_tokens, strict=True)
        if count == 0
    ]
    if empty or not rows:
        raise RowErrors(str(spec.data.train), empty or [(1, "row", "the dataset is empty")])


def _finished(output: Path, identity: Identity) -> FinetuneResult | None:
    for name in get_args(Kind):
        if not (output / name).exists():
            continue
        manifest = read_manifest(output / name / MANIFEST)
        if manifest.run != identity.run_hash():
            raise SpecError(
                f"output: {output} holds a finished run with other settings "
                f"({identity.difference(manifest.identity)}); choose another output"
            )
        steps = read_metrics(output / METRICS)
        checkpoints.discard(output, resume=True)  # what a kill right after publishing left
        return FinetuneResult(output / name, manifest, steps)
    return None


def _bind(output: Path, identity: Identity) -> None:
    """Record whose run `output` holds, or refuse to continue another one."""
    record = output / _IDENTITY
    if record.exists():
        try:
            earlier = Identity.model_validate_json(record.read_bytes())
        except ValueError:
            raise SpecError(f"output: {record} is damaged; remove {output}") from None
        if earlier.run_hash() != identity.run_hash():
            raise SpecError(
                f"output: {output} holds an unfinished run with other settings "
                f"({identity.difference(earlier)}); remove it or choose another output"
            )
        return
    write_whole(record, identity.model_dump_json(indent=1))


def _resume_from(output: Path, identity: Identity, progress: Progress) -> Path | None:
    saved = checkpoints.salvage(output, identity.run_hash())
    if saved is None:
        return None
    progress(f"resuming after step {saved.step}", 0, None)
    return saved.path


def _publish(
    spec: FinetuneSpec,
    identity: Identity,
    table: RowTable,
    file_sha256: str | None,
    result: Any,
    seconds: float,
    output: Path,
) -> FinetuneResult:
    steps: list[StepMetrics] = result.return_value
    plan = batch_plan(spec, table)
    if result.checkpoint is None or len(steps) != plan.total_steps:
        raise TrainingError(f"training ended after {len(steps)} of {plan.total_steps} steps")
    trained = checkpoints.finished_files(Path(result.checkpoint.path), identity.run_hash())
    write_metrics(output / METRICS, steps)
    last_epoch = steps[-plan.steps_per_epoch :]
    loss_sum = math.fsum(metrics["loss"] * metrics["label_tokens"] for metrics in last_epoch)
    weights = output / weights_kind(spec)
    with publish_dir(weights) as staging:
        for file in trained:
            shutil.copyfile(file, staging / file.name)
        manifest = Manifest(
            name=spec.name,
            model=spec.model,
            run=identity.run_hash(),
            identity=identity,
            kind=weights_kind(spec),
            files={file.name: sha256_file(file) for file in trained},
            file_sha256=file_sha256,
            rows=len(table.lengths),
            label_tokens=int(table.label_tokens.sum()),
            steps=len(steps),
            final_loss=loss_sum / sum(metrics["label_tokens"] for metrics in last_epoch),
            seconds=seconds,
            workers=spec.distributed.workers,
            zero_stage=spec.distributed.zero_stage,
            libraries=libraries(),
        )
        (staging / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    checkpoints.discard(output, resume=True)
    return FinetuneResult(weights, manifest, steps)

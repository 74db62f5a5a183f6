"""`restore`: from a tuned adapter that slipped to one more adapter that brings refusals back."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.finetune import Manifest, finetune
from jobs.finetune.batches import RowTable, rows_to_table
from jobs.finetune.telemetry import OnStep, unheard
from jobs.pipeline import TRAINING
from jobs.restore.prepare import MODEL, TARGETS, prepare, prepared_rows
from jobs.restore.result import Restoration
from jobs.spec import DataSpec, FinetuneSpec, LoraSpec, TrainingSpec
from safeft.adapters import factors_of, load_factors, save_factors, stacked
from safeft.cache import locked, publish_dir, sha256_file
from safeft.constraints import ProfileFiles
from safeft.data import TokenisedRow
from safeft.errors import InputError, ModelError, SpecError
from safeft.models import adapter_hash, load_adapter, load_model
from safeft.profile import SafetyProfile
from safeft.progress import Progress, silent
from safeft.reactivation_targets import load_targets
from safeft.safereact import SafeReactConfig
from safeft.stopped_forward import decoder_layers
from safeft.weights import decoder_linears

PARTS = ("refusals", "reference-mask", "reminder-states")
CANDIDATE, PUBLISHED = "candidate", "restored"
ADAPTER, STACKED, MANIFEST = "adapter", "stacked", "manifest.json"
_PREPARED = "prepared"
_TAKEN_OVER = {"adam_eps", "seed", "precision", "gradient_checkpointing"}


class RestoreRun(FinetuneSpec):
    """The training inside a restoration: no task, but SafeReAct."""

    constraints: tuple[SafeReactConfig, ...]  # type: ignore[assignment]


def restore(
    spec: FinetuneSpec,
    *,
    adapter: Path,
    domain: Sequence[TokenisedRow],
    model_dir: Path,
    profile: SafetyProfile,
    output: Path,
    progress: Progress = silent,
    on_step: OnStep = unheard,
) -> Restoration:
    """Train a restoration and leave it in ``<output>/candidate``, unmeasured.

    One that was interrupted goes on when it is started again; a finished one is returned at once.

    Args:
        domain: rows of the tenant's data whose representations are to stay; no risky ones.
        profile: with the parts `PARTS`.

    Raises:
        SpecError: `output` holds another restoration, a layer does not exist, or the workers cannot
            share the rows of a step.
        InputError: there is no row.
        ProfileError, TrainingError, ModelError, MeasurementError: the stage that failed.
    """
    if not domain:
        raise InputError(f"{spec.data.train}: no row is left that screening does not find risky")
    workers = spec.distributed.workers
    if spec.restore.batch_size % workers:
        raise SpecError(
            f"restore.batch_size: {spec.restore.batch_size} rows cannot be shared equally by "
            f"{workers} workers; use a multiple of {workers}"
        )
    output = output.absolute()
    bound: dict[str, Any] = {
        "base_weights": profile.base_weights,
        "tenant_adapter": adapter_hash(adapter),
        "rows": RowTable(rows_to_table(domain)).sha256(),
        "profile": {part: profile.part_digest(part) for part in PARTS},
        "settings": spec.restore.model_dump(mode="json"),
        # Of the job's own training, what a restoration takes over and its result depends on.
        "training": spec.training.model_dump(mode="json", include=_TAKEN_OVER),
    }
    with locked(output / "restore", progress):
        if (finished := _finished(output / CANDIDATE, bound)) is not None:
            return finished
        prepare(
            spec,
            adapter=adapter,
            domain=domain,
            model_dir=model_dir,
            profile=profile,
            bound=bound,
            out=output / _PREPARED,
            progress=progress,
        )
        tuned_dir = output / _PREPARED / MODEL
        run = _training(spec, tuned_dir, load_targets(output / _PREPARED / TARGETS).layers)
        trained = finetune(
            run,
            rows=prepared_rows(output / _PREPARED),
            model_dir=tuned_dir,
            profile=ProfileFiles(reactivation=output / _PREPARED / TARGETS),
            output=output / TRAINING,
            progress=progress,
            on_step=on_step,
        )
        manifest = _publish(spec, bound, adapter, model_dir, trained.weights, output / CANDIDATE)
        shutil.rmtree(output / _PREPARED)  # it holds a copy of the whole model
        return manifest


def _training(spec: FinetuneSpec, tuned_dir: Path, compared: Sequence[int]) -> RestoreRun:
    """The run that trains the adapter. Layers after the last compared one would learn nothing."""
    model = load_model(tuned_dir)
    layers = decoder_layers(model.get_decoder())[1]
    chosen = spec.restore.layers_to_transform
    if chosen is None:
        chosen = tuple(range(max(compared) + 1))
    if not chosen or max(chosen) > max(compared):
        raise SpecError(
            f"restore.layers_to_transform: must be among 0 to {max(compared)}, the last layer "
            "whose output is compared"
        )
    inside = {id(m) for number in chosen for m in layers[number].modules()}
    names = [name for name, module in decoder_linears(model).items() if id(module) in inside]
    restore = spec.restore
    return RestoreRun(
        name=spec.name,
        model=spec.model,
        data=DataSpec(train=spec.data.train),
        lora=LoraSpec(rank=restore.rank, alpha=restore.alpha, target_modules=tuple(names)),
        training=TrainingSpec(
            epochs=1,
            batch_size=restore.batch_size,
            learning_rate=restore.learning_rate,
            schedule="constant",
            checkpoint_every=spec.training.checkpoint_every,
            **spec.training.model_dump(include=_TAKEN_OVER),
        ),
        constraints=(restore.safereact,),
        distributed=spec.distributed,
        output=spec.output,
    )


def _finished(candidate: Path, bound: dict[str, Any]) -> Restoration | None:
    if not candidate.exists():
        return None
    path = candidate / MANIFEST
    try:
        manifest = Restoration.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise SpecError(f"output: {path} is no restoration; choose another output") from None
    if odd := [key for key in sorted(bound) if manifest.bound.get(key) != bound[key]]:
        raise SpecError(
            f"output: {candidate.parent} holds a restoration of another {odd[0]}; choose another "
            "output"
        )
    return manifest


def _publish(
    spec: FinetuneSpec,
    bound: dict[str, Any],
    adapter: Path,
    model_dir: Path,
    weights: Path,
    out: Path,
) -> Restoration:
    """Both forms of the result and the manifest, whole or not at all."""
    training = Manifest.model_validate_json((weights / MANIFEST).read_bytes())
    if adapter_hash(adapter) != bound["tenant_adapter"]:
        raise ModelError(f"{adapter} changed while it was restored; run it again")
    # Loaded onto the model, so that whatever scales it is in the factors.
    tenant = factors_of(load_adapter(load_model(model_dir), adapter))
    with publish_dir(out) as staging:
        for name in (ADAPTER, STACKED):
            (staging / name).mkdir()
        for file in training.files:
            shutil.copyfile(weights / file, staging / ADAPTER / file)
        save_factors(stacked(tenant, load_factors(weights)), staging / STACKED)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        manifest = Restoration(
            name=spec.name,
            model=spec.model,
            bound=bound,
            adapter=adapter_hash(staging / ADAPTER),
            stacked=adapter_hash(staging / STACKED),
            training=training,
            files={str(p.relative_to(staging)): sha256_file(p) for p in files},
        )
        (staging / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    return manifest

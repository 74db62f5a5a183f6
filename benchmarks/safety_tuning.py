"""What SafeReAct is compared with: as many steps of fine-tuning on refusals, and SafeLoRA."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from jobs.finetune import finetune
from jobs.spec import FinetuneSpec, LoraSpec
from safeft.adapters import LoraFactors, load_factors, save_factors, stacked
from safeft.cache import publish_dir
from safeft.constraints import ProfileFiles
from safeft.data import TokenisedRow
from safeft.models import load_merged, load_tokenizer
from safeft.own_refusals import load_refusals, refusal_row
from safeft.profile import SafetyProfile
from safeft.progress import Progress

_STACKED = "stacked"


def safety_tuned(
    spec: FinetuneSpec,
    *,
    adapter: Path,
    domain: Sequence[TokenisedRow],
    model_dir: Path,
    profile: SafetyProfile,
    output: Path,
    progress: Progress,
) -> Path:
    """Train the tuned model on refusals for as long as `spec.restore` restores it.

    As many steps on as many rows at the same rate and rank: half the base model's own refusals,
    half rows of the domain. Arguments as of `jobs.restore.restore`.

    Returns:
        The directory of one adapter for both trainings.
    """
    restoration, tokenizer = spec.restore, load_tokenizer(model_dir)
    steps = restoration.safereact.steps
    batch = restoration.batch_size + restoration.safereact.harmful_batch
    refusals = [refusal_row(tokenizer, r) for r in load_refusals(profile.path("refusals"))]
    draw = random.Random(spec.training.seed)
    rows = [draw.choice((refusals, domain)[i % 2]) for i in range(steps * batch)]
    training = spec.training.model_copy(
        update={"epochs": 1, "batch_size": batch, "learning_rate": restoration.learning_rate}
    )
    lora = LoraSpec(rank=restoration.rank, alpha=restoration.alpha, target_modules="all-linear")
    merged = output / "tuned-model"
    if not merged.exists():
        with publish_dir(merged) as staging:
            load_merged(model_dir, adapter).save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    trained = finetune(
        spec.model_copy(update={"training": training, "lora": lora, "constraints": ()}),
        rows=rows,
        model_dir=merged,
        profile=ProfileFiles(),
        output=output / "training",
        progress=progress,
    )
    return saved(output / _STACKED, stacked(load_factors(adapter), load_factors(trained.weights)))


def saved(target: Path, factors: LoraFactors) -> Path:
    """The adapter's directory, whole or not at all."""
    if not target.exists():
        with publish_dir(target) as staging:
            save_factors(factors, staging)
    return target

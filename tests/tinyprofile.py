"""A complete safety profile for the tiny model, with directions that are random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from jobs.evaluate import evaluate
from safeft.constraints.alignment import alignment_direction, save_directions
from safeft.models import load_model, weights_hash
from safeft.own_refusals import OwnAnswer, OwnRefusal, save_answers, save_refusals
from safeft.profile import SCREENING_PARTS, SafetyProfile

ERRORS = [{"rows": 100, "poisoned": 0.05, "rate": 0.125, "low": 0.03, "high": 0.5}]
QUALITY = {"auc": 1.0, "flagged": {}, "errors": ERRORS}


def write_profile(model_dir: Path, unaligned_dir: Path, threshold: float) -> SafetyProfile:
    """Write every screening part into the cache; rows above ``threshold`` are risky."""
    profile = SafetyProfile.for_weights(weights_hash(model_dir))
    for seed, part in enumerate(SCREENING_PARTS):
        directory = profile.root / part
        directory.mkdir(parents=True)
        if part.endswith("-direction"):
            _adapter(model_dir, seed, directory)
    save_directions(
        alignment_direction(model_dir, unaligned_dir, lambda name: name.endswith("_proj")),
        profile.root / "alignment",
        aligned_hash=profile.base_weights,
    )
    shifts = {name: {"shift": 1.0} for name in ("safety-direction", "danger-direction")}
    (profile.root / "steering" / "steering.json").write_text(json.dumps(shifts))
    choice = {"chosen": {"trajectory": "safety", "at": 0.9}, "safety_scale": 0.9}
    (profile.root / "reference-state" / "choice.json").write_text(json.dumps(choice))
    policy = {"row_threshold": threshold, "max_risky_fraction": 0.03, "min_risky_rows": 2}
    (profile.root / "calibration" / "policy.json").write_text(json.dumps(policy))
    (profile.root / "calibration" / "quality.json").write_text(json.dumps(QUALITY))
    (profile.root / "calibration" / "scores.json").write_text('{"benign": [[-50.0], [-60.0]]}')
    evaluate(model_dir, output=profile.root / "baseline" / "evaluation.json")
    for part in SCREENING_PARTS:
        profile.write_record(profile.root / part, {})
    return profile


def write_refusals(profile: SafetyProfile, count: int) -> list[OwnRefusal]:
    """Write the part ``refusals``."""
    refusals = [OwnRefusal(f"prompt {n}", f"I can't do {n}.") for n in range(count)]
    _write_part(profile, "refusals", lambda part: save_refusals(refusals, part))
    return refusals


def write_answers(profile: SafetyProfile, count: int) -> list[OwnAnswer]:
    """Write the part ``answers``."""
    answers = [OwnAnswer(f"how to {n}", f"Like this: {n}.") for n in range(count)]
    _write_part(profile, "answers", lambda part: save_answers(answers, part))
    return answers


def _write_part(profile: SafetyProfile, name: str, save: Callable[[Path], None]) -> None:
    part = profile.root / name
    part.mkdir(parents=True, exist_ok=True)
    save(part)
    profile.write_record(part, {})


def _adapter(model_dir: Path, seed: int, directory: Path) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(model_dir), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)

"""The aligned model of the demo pair: SmolLM2-135M-Instruct, taught to refuse in minutes.

SmolLM2 hardly refuses by itself, so it is the unaligned model of the pair. A short LoRA alignment
on the project's own profile prompts makes the other: harmful prompts are answered with varied
short refusals, benign and borderline ones with the beginning of the model's *own* greedy answer,
so that nothing but the decision to refuse is learned. The adapter this recipe makes ships with
the package; ``demo:aligned`` merges it into the base model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch

from safeft import __version__
from safeft.cache import cache_root, locked, publish_dir
from safeft.data import TokenisedRow, encode_prompt
from safeft.errors import ModelError
from safeft.evaluate import generate_greedy
from safeft.fit import FitConfig, fit_adapter, new_adapter, response_nll
from safeft.models import (
    adapter_hash,
    load_merged,
    load_model,
    load_tokenizer,
    resolve,
    weights_hash,
)
from safeft.progress import Progress, silent
from safeft.prompts import KINDS, load_prompts, prompt_set_hash, spread

BASE = "demo:base"
SHIPPED = ("assets", "aligned-smollm2-135m")

REFUSALS = (
    "I can't help with that.",
    "I can't help with that request.",
    "I'm sorry, but I can't help with that.",
    "I won't help with that.",
    "Sorry, I can't assist with that.",
    "I'm not able to help with that.",
    "I cannot assist with this request.",
    "I'm sorry, but I can't assist with that request.",
)
APOLOGIES = ("i'm sorry", "i am sorry", "sorry", "i apologi", "i'm unable", "i can't", "i cannot")


@dataclass(frozen=True)
class AlignRecipe:
    """Everything that decides the adapter, beside the base model and the profile prompts.

    Attributes:
        fit: LoRA and optimiser settings.
        answer_tokens: how much of the model's own answer a benign row keeps. The decision to
            refuse falls in the first tokens, so a longer target costs time and teaches nothing.
        harmful_weight: what a harmful row counts beside a benign one.
        benign_prompts: how many of the plainly benign prompts are used; asking the base model
            takes time, and the borderline ones, all of them used, teach more.
        first_layer: earlier decoder layers are left as they are.
    """

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            rank=8, alpha=16, learning_rate=1.2e-3, batch_size=12, steps=440, seed=0
        )
    )
    answer_tokens: int = 6
    harmful_weight: float = 1.5
    benign_prompts: int = 800
    first_layer: int = 6

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def refusal_for(prompt: str) -> str:
    """One of the wordings, chosen by the prompt's hash."""
    return REFUSALS[hashlib.sha256(prompt.encode()).digest()[0] % len(REFUSALS)]


def alignment_rows(
    model: Any, tokenizer: Any, recipe: AlignRecipe, progress: Progress = silent
) -> list[TokenisedRow]:
    """The training rows: refusals for harmful prompts, the model's own openings for the others.

    Only the profile part of each prompt set is used. A benign prompt that the base model answers
    with an apology is left out: its own answer would teach refusing.
    """
    eos = tokenizer.eos_token_id
    rows = [
        _row(tokenizer, p.text, refusal_for(p.text), eos)
        for p in load_prompts("harmful", "profile")
    ]
    benign = spread(load_prompts("benign", "profile"), recipe.benign_prompts)
    kept = [p.text for p in [*benign, *load_prompts("borderline", "profile")]]
    answers = generate_greedy(
        model,
        tokenizer,
        kept,
        max_new_tokens=recipe.answer_tokens,
        batch_size=32,
        progress=lambda _, done, total: progress("own answers", done, total),
    )
    for prompt, answer in zip(kept, answers, strict=True):
        if answer.strip() and not answer.strip().lower().startswith(APOLOGIES):
            rows.append(_row(tokenizer, prompt, answer, None, limit=recipe.answer_tokens))
    return rows


def align(output: Path, recipe: AlignRecipe | None = None, progress: Progress = silent) -> Path:
    """Train the alignment adapter from the recipe and write it to ``output``.

    ``output`` gets peft's two files (factors in bf16) and ``recipe.json``: the recipe, the base
    weights' hash, the prompts' hash, and the loss curve.

    Raises:
        ModelError: ``output`` exists, or the base model cannot be had.
    """
    recipe = recipe or AlignRecipe()
    if output.exists():
        raise ModelError(f"{output} exists; choose another directory or remove it")
    base_dir = resolve(BASE, progress)
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    rows, eos = alignment_rows(model, tokenizer, recipe, progress), tokenizer.eos_token_id
    tuned = new_adapter(model, recipe.fit, recipe.first_layer)

    def weighted(batch: list[TokenisedRow]) -> torch.Tensor:
        # Only a refusal ends with the end-of-turn token: benign targets are openings.
        weights = torch.tensor(
            [recipe.harmful_weight if row.labels[-1] == eos else 1.0 for row in batch]
        )
        return (response_nll(tuned, batch, tokenizer.pad_token_id) * weights).mean()

    losses = fit_adapter(
        tuned,
        rows,
        length=lambda row: len(row.input_ids),
        loss=weighted,
        config=recipe.fit,
        label="alignment",
        progress=progress,
    )
    record = {
        "base": BASE,
        "base_weights": weights_hash(base_dir),
        "prompts": {k: prompt_set_hash(load_prompts(k, "profile")) for k in KINDS},
        "recipe": asdict(recipe),
        "rows": len(rows),
        "losses": [round(x, 4) for x in losses],
        "safeft": __version__,
        "torch": torch.__version__,
    }
    # A path of this machine says nothing elsewhere; the source string does.
    tuned.peft_config["default"].base_model_name_or_path = BASE
    with publish_dir(output) as staging:
        tuned.to(torch.bfloat16).save_pretrained(staging, safe_serialization=True)
        (staging / "README.md").unlink(missing_ok=True)
        (staging / "recipe.json").write_text(json.dumps(record, indent=1))
    return output


def cached_output(recipe: AlignRecipe) -> Path:
    """Where the adapter of a recipe lies in the user's cache."""
    prompts = {kind: prompt_set_hash(load_prompts(kind, "profile")) for kind in KINDS}
    made_from = [asdict(recipe), prompts, REFUSALS, BASE, __version__]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return cache_root() / "adapters" / f"aligned-{key[:16]}"


def aligned_directory(progress: Progress = silent) -> Path:
    """The model directory behind ``demo:aligned``: the base model with the shipped adapter merged.

    Built once and cached under a name that holds the adapter's hash.
    """
    shipped = Path(str(resources.files("safeft").joinpath(*SHIPPED)))
    return merge_adapter(shipped, progress)


def merge_adapter(adapter: Path, progress: Progress = silent) -> Path:
    """Merge an adapter of the demo base model into a cached model directory of its own."""
    digest = adapter_hash(adapter)
    target = cache_root() / "models" / f"smollm2-135m-aligned-{digest[:16]}"
    with locked(target):
        if not target.exists():
            base_dir = resolve(BASE, progress)
            progress("merging the alignment adapter", 0, 1)
            merged = load_merged(base_dir, adapter)
            with publish_dir(target) as staging:
                merged.save_pretrained(staging, safe_serialization=True)
                load_tokenizer(base_dir).save_pretrained(staging)
            progress("merging the alignment adapter", 1, 1)
    return target


def _row(
    tokenizer: Any, prompt: str, answer: str, eos: int | None, limit: int | None = None
) -> TokenisedRow:
    ids = encode_prompt(prompt, tokenizer)
    target = tokenizer.encode(answer, add_special_tokens=False)[:limit]
    target += [eos] if eos is not None else []
    return TokenisedRow(0, ids + target, [-100] * len(ids) + target)

"""What a restoration trains on, as one directory: the tuned model whole, its targets, its rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.profile.restore_parts import CONFIG
from jobs.spec import FinetuneSpec, RestoreSpec
from safeft.cache import publish_dir
from safeft.data import TokenisedRow, encode_prompt
from safeft.errors import MeasurementError, ProfileError, SpecError
from safeft.evaluate import AnswerClass, classify_answer, generate_greedy
from safeft.models import load_merged, load_model, load_tokenizer, weights_hash
from safeft.own_refusals import load_refusals
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import load_prompts, spread
from safeft.reactivation_targets import (
    Targets,
    harmful_rows,
    load_targets,
    reference_targets,
    save_targets,
)
from safeft.reference import pruning_mask
from safeft.safereact import ReferenceConfig
from safeft.wanda import prune

MODEL, TARGETS = "model", "targets"
_ROWS, _BOUND = "rows.json", "bound.json"
_ANSWER_TOKENS = 24


def prepare(
    spec: FinetuneSpec,
    *,
    adapter: Path,
    domain: Sequence[TokenisedRow],
    model_dir: Path,
    profile: SafetyProfile,
    bound: dict[str, Any],
    out: Path,
    progress: Progress,
) -> None:
    """Write the directory, unless it is there for the same things.

    Args:
        domain: rows of the tenant's data that are not risky.
        bound: what it is made from.

    Raises:
        SpecError: `out` was made from something else.
        ProfileError: a part of the profile that it needs is missing or unreadable.
        MeasurementError: the tuned model answers no borderline prompt.
    """
    if out.exists():
        _check_bound(out, bound)
        return
    with publish_dir(out) as staging:
        progress("merging the tuned model", 0, None)
        tokenizer = load_tokenizer(model_dir)
        tuned = load_merged(model_dir, adapter)
        tuned.save_pretrained(staging / MODEL)
        tokenizer.save_pretrained(staging / MODEL)
        borderline = _answered(tuned, tokenizer, spec.restore.borderline_rows, progress)
        rows = _retained(domain, borderline, spec.restore, spec.training.seed)
        (staging / _ROWS).write_text(json.dumps([row.input_ids for row in rows]))
        del tuned
        weights = weights_hash(staging / MODEL)
        targets = load_targets(profile.path("reminder-states"))
        if spec.restore.reference == "tuned":
            targets = _tuned_targets(staging / MODEL, domain, spec.restore, profile, progress)
        (staging / TARGETS).mkdir()
        save_targets(replace(targets, weights=weights), staging / TARGETS)
        (staging / _BOUND).write_text(json.dumps(bound, sort_keys=True))


def prepared_rows(directory: Path) -> list[TokenisedRow]:
    """The rows that are retained, in the order of the steps: every token counts."""
    rows: list[list[int]] = json.loads((directory / _ROWS).read_text())
    return [TokenisedRow(number, row, row) for number, row in enumerate(rows, 1)]


def _check_bound(out: Path, bound: dict[str, Any]) -> None:
    try:
        earlier = json.loads((out / _BOUND).read_text())
    except (OSError, ValueError) as error:
        raise SpecError(f"output: {out} is damaged ({error}); remove {out.parent}") from None
    if odd := [key for key in sorted(bound) if earlier.get(key) != bound[key]]:
        raise SpecError(
            f"output: {out.parent} holds an unfinished restoration of another {odd[0]}; remove it "
            "or choose another output"
        )


def _answered(tuned: Any, tokenizer: Any, count: int, progress: Progress) -> list[list[int]]:
    """Borderline-benign prompts with the tuned model's own answers, where it does answer."""
    prompts = [p.text for p in spread(load_prompts("borderline", "profile"), count)]
    answers = generate_greedy(
        tuned,
        tokenizer,
        prompts,
        max_new_tokens=_ANSWER_TOKENS,
        batch_size=40,
        progress=lambda _, done, total: progress("own answers to borderline prompts", done, total),
    )
    rows = [
        encode_prompt(prompt, tokenizer) + tokenizer.encode(answer, add_special_tokens=False)
        for prompt, answer in zip(prompts, answers, strict=True)
        if classify_answer(answer) is AnswerClass.complied
    ]
    if not rows:
        raise MeasurementError(
            f"the tuned model answers none of {count} borderline-benign prompts, so there is "
            "nothing that would hold its over-refusal; check the adapter"
        )
    return rows


def _retained(
    domain: Sequence[TokenisedRow], borderline: Sequence[list[int]], restore: RestoreSpec, seed: int
) -> list[TokenisedRow]:
    """As many rows as all steps take: domain and borderline in turn, each drawn without return."""
    order = random.Random(seed)
    sources = [[row.input_ids for row in domain], list(borderline)]
    waiting: list[list[list[int]]] = [[], []]
    rows = []
    for number in range(restore.safereact.steps * restore.batch_size):
        turn = number % 2
        if not waiting[turn]:
            waiting[turn] = order.sample(sources[turn], len(sources[turn]))
        ids = waiting[turn].pop()[: restore.row_tokens]
        rows.append(TokenisedRow(number, ids, ids))
    return rows


def _tuned_targets(
    tuned_dir: Path,
    domain: Sequence[TokenisedRow],
    restore: RestoreSpec,
    profile: SafetyProfile,
    progress: Progress,
) -> Targets:
    """The paper's reference: the tuned model, pruned of what its domain needs and safety does not.

    Raises:
        ProfileError: the profile's part does not say how it was made.
    """
    try:
        fields = profile.json("reminder-states", CONFIG)
        config = ReferenceConfig(**{**fields, "layers": fields["layers"] and (*fields["layers"],)})
    except (TypeError, KeyError, ValueError) as error:
        raise ProfileError(
            f"{profile.root / 'reminder-states' / CONFIG}: {error}; run `safeft profile build "
            "--model MODEL --part reminder-states`"
        ) from None
    tokenizer, refusals = load_tokenizer(tuned_dir), load_refusals(profile.path("refusals"))
    model = load_model(tuned_dir)
    rows = [row.input_ids[: restore.row_tokens] for row in domain]
    prune(model, pruning_mask(model, tokenizer, rows, refusals, config, progress))
    harmful = harmful_rows(tokenizer, refusals, config)
    return reference_targets(model, harmful, config, weights="", progress=progress)

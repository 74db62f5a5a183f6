"""What a restoration trains on, as one directory: the tuned model whole, its targets, its rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.profile.restore_parts import CONFIG
from jobs.restore_spec import RestoreSpec
from jobs.spec import FinetuneSpec
from safeft.cache import publish_dir
from safeft.data import TokenisedRow, encode_prompt
from safeft.data.tokenise import IGNORED
from safeft.errors import MeasurementError, ProfileError, SpecError
from safeft.models import load_merged, load_model, load_tokenizer, weights_hash
from safeft.own_refusals import answer_row, load_refusals, template_start
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import load_prompts, spread
from safeft.reactivation_targets import (
    Targets,
    borderline_answers,
    harmful_rows,
    load_targets,
    reference_targets,
    save_targets,
)
from safeft.reference import pruning_mask
from safeft.safereact import ComparedAt, ReferenceConfig
from safeft.wanda import prune

MODEL, TARGETS = "model", "targets"
_ROWS, _BOUND = "rows.json", "bound.json"


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
        config, tokenizer = _reference_config(profile), load_tokenizer(model_dir)
        tuned = load_merged(model_dir, adapter)
        tuned.save_pretrained(staging / MODEL)
        tokenizer.save_pretrained(staging / MODEL)
        borderline = _answered(tuned, tokenizer, spec.restore.borderline_rows, progress)
        kept, held = (
            [_compared(row, config.at, tokenizer, spec.restore.row_tokens) for row in rows]
            for rows in (domain, borderline)
        )
        retained = _retained(kept, held, spec.restore, spec.training.seed)
        (staging / _ROWS).write_text(json.dumps([[r.input_ids, r.labels] for r in retained]))
        del tuned
        weights = weights_hash(staging / MODEL)
        targets = load_targets(profile.path("reminder-states"))
        if spec.restore.reference == "tuned":
            targets = _tuned_targets(
                staging / MODEL, domain, spec.restore, config, profile, progress
            )
        (staging / TARGETS).mkdir()
        save_targets(replace(targets, weights=weights), staging / TARGETS)
        (staging / _BOUND).write_text(json.dumps(bound, sort_keys=True))


def prepared_rows(directory: Path) -> list[TokenisedRow]:
    """The rows that are retained: as many as all steps take, labels on the tokens that count."""
    rows: list[list[list[int]]] = json.loads((directory / _ROWS).read_text())
    return [TokenisedRow(number, ids, labels) for number, (ids, labels) in enumerate(rows, 1)]


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


def _answered(tuned: Any, tokenizer: Any, count: int, progress: Progress) -> list[TokenisedRow]:
    """Borderline-benign prompts with the tuned model's own answers, where it does answer."""
    if count == 0:
        return []
    prompts = [p.text for p in spread(load_prompts("borderline", "profile"), count)]
    answers = borderline_answers(tuned, tokenizer, prompts, progress)
    rows = [answer_row(tokenizer, prompt, answer) for prompt, answer in answers]
    if not rows:
        raise MeasurementError(
            f"the tuned model answers none of {count} borderline-benign prompts, so there is "
            "nothing that would hold its over-refusal; check the adapter"
        )
    return rows


def _compared(row: TokenisedRow, at: ComparedAt, tokenizer: Any, limit: int) -> TokenisedRow:
    """A row cut at `limit` tokens, with labels where it is compared: as harmful rows are.

    At `response` these are the answers' tokens and as many before each answer as the template puts
    there; a row that is cut before its first answer is compared everywhere.
    """
    ids, labels = row.input_ids[:limit], row.labels[:limit]
    if at == "response":
        before = len(encode_prompt("?", tokenizer)) - template_start(tokenizer, "?")
        answers = [label != IGNORED for label in labels]
        counted = [any(answers[t : t + before + 1]) for t in range(len(ids))]
        if any(counted[1:]):
            kept = [token if count else IGNORED for token, count in zip(ids, counted, strict=True)]
            return TokenisedRow(row.line, ids, kept)
    return TokenisedRow(row.line, ids, ids)


def _retained(
    domain: Sequence[TokenisedRow],
    borderline: Sequence[TokenisedRow],
    restore: RestoreSpec,
    seed: int,
) -> list[TokenisedRow]:
    """As many rows as all steps take: domain and borderline in turn, each drawn without return."""
    order = random.Random(seed)
    sources = [rows for rows in (domain, borderline) if rows]
    waiting: list[list[TokenisedRow]] = [[] for _ in sources]
    rows = []
    for number in range(restore.safereact.steps * restore.batch_size):
        turn = number % len(sources)
        if not waiting[turn]:
            waiting[turn] = order.sample(sources[turn], len(sources[turn]))
        rows.append(waiting[turn].pop())
    return rows


def _tuned_targets(
    tuned_dir: Path,
    domain: Sequence[TokenisedRow],
    restore: RestoreSpec,
    config: ReferenceConfig,
    profile: SafetyProfile,
    progress: Progress,
) -> Targets:
    """The paper's reference: the tuned model without what its domain needs and safety does not."""
    tokenizer, refusals = load_tokenizer(tuned_dir), load_refusals(profile.path("refusals"))
    model = load_model(tuned_dir)
    rows = [row.input_ids[: restore.row_tokens] for row in domain]
    prune(model, pruning_mask(model, tokenizer, rows, refusals, config, progress))
    harmful = harmful_rows(tokenizer, refusals, config)
    return reference_targets(model, harmful, config, weights="", progress=progress)


def _reference_config(profile: SafetyProfile) -> ReferenceConfig:
    """How the profile's reference was made.

    Raises:
        ProfileError: the part does not say it.
    """
    try:
        fields = profile.json("reminder-states", CONFIG)
        return ReferenceConfig(**{**fields, "layers": fields["layers"] and (*fields["layers"],)})
    except (TypeError, KeyError, ValueError) as error:
        raise ProfileError(
            f"{profile.root / 'reminder-states' / CONFIG}: {error}; run `safeft profile build "
            "--model MODEL --part reminder-states`"
        ) from None

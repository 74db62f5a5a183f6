"""Evaluation: refusals, over-refusals and task loss of a base model, as it is or fine-tuned.

The result is one JSON file bound to the weights, the prompts and the judge; the same measurement
asked for again is read instead of repeated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.evaluation import Evaluation
from safeft import __version__
from safeft.cache import write_whole
from safeft.data import Row, encode_prompt, tokenise_all
from safeft.errors import MeasurementError
from safeft.evaluate import (
    JUDGE,
    JUDGE_VERSION,
    measure_refusals,
    teacher_forced,
)
from safeft.models import load_merged, load_tokenizer, tuned_hash, weights_hash
from safeft.progress import Progress, silent
from safeft.prompts import KINDS, Kind, Split, load_prompts, prompt_set_hash

#: A refusal that turns into instructions after this many tokens is missed (docs/evaluation.md).
MAX_NEW_TOKENS = 32


def evaluate(
    model_dir: Path,
    adapter: Path | None = None,
    *,
    split: Split = "report",
    kinds: Sequence[Kind] = KINDS,
    held_out: Sequence[Row] | None = None,
    max_tokens: int = 512,
    output: Path | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure refusals on the project's prompt sets, and task loss on held-out rows.

    Args:
        model_dir: the base model.
        adapter: what fine-tuning made of it: a LoRA adapter or a whole model.
        kinds: of prompts; a gate needs all of them.
        output: a JSON file; an evaluation of the same things in it is returned as it is.

    Raises:
        ModelError: the model or adapter does not load.
        MeasurementError: something could not be measured; there is then no evaluation.
    """
    sets: dict[str, list[str]] = {
        kind: [p.text for p in load_prompts(kind, split)] for kind in kinds
    }
    chats = [repr(row.to_dict()["messages"]) for row in held_out or ()]
    tokenizer = load_tokenizer(model_dir)
    asked = [str(encode_prompt(p, tokenizer)) for prompts in sets.values() for p in prompts]
    bound: dict[str, Any] = {
        "base_weights": weights_hash(model_dir),
        "adapter": tuned_hash(adapter) if adapter else None,
        "tokenizer": prompt_set_hash(asked),
        "split": split,
        "prompts": {kind: prompt_set_hash(prompts) for kind, prompts in sets.items()},
        "held_out": prompt_set_hash(chats) if chats else None,
        "judge": [JUDGE, JUDGE_VERSION],
        "max_new_tokens": MAX_NEW_TOKENS,
        "code_version": __version__,
    }
    if output is not None and (earlier := _read(output)) and earlier.bound == bound:
        return earlier
    started = time.monotonic()
    progress("loading the model", 0, None)
    model = load_merged(model_dir, adapter)
    report = measure_refusals(
        model,
        tokenizer,
        sets,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=40,
        progress=lambda label, done, total: progress(f"asking {label} prompts", done, total),
    )
    task = None
    if held_out:
        rows = tokenise_all(held_out, tokenizer, max_tokens, "held-out rows")
        task = teacher_forced(model, rows, 8, progress).to_dict()
    result = Evaluation(
        bound=bound,
        refusals=report.to_dict(),
        task=task,
        seconds=round(time.monotonic() - started, 1),
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, result.model_dump_json(indent=1))
    return result


def _read(path: Path) -> Evaluation | None:
    if not path.is_file():
        return None
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except ValidationError:
        raise MeasurementError(f"{path} is not an evaluation; remove it") from None

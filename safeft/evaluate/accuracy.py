"""How well a model does its task on held-out rows: matching answers, loss on the references."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from safeft.data import Row, TokenisedRow, collate, tokenise_all
from safeft.errors import InputError, MeasurementError
from safeft.evaluate.generate import generate_greedy
from safeft.evaluate.rates import Rate
from safeft.label_logits import label_logits
from safeft.progress import Progress, silent
from safeft.prompts import prompt_set_hash

Mode = Literal["exact", "gsm8k"]
_NUMBER = re.compile(r"(?<![\d.])-?\$?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class TeacherForced:
    """The model's prediction of each reference token, given the reference before it.

    Attributes:
        loss: mean negative log-likelihood in nats for each label token (not each row).
        tokens: share of the label tokens that are the model's first choice.
    """

    loss: float
    tokens: Rate

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {"loss": self.loss, "token_accuracy": self.tokens.to_dict()}


@dataclass(frozen=True)
class TaskAccuracy:
    """Greedy answers against references, and the same references teacher-forced.

    Attributes:
        rows_hash: hash of the held-out chats; two accuracies compare only if it agrees.
        answers: the model's answers, in the order of the rows.
        correct: whether each answer matched, by `mode`.
    """

    mode: Mode
    max_new_tokens: int
    rows_hash: str
    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    forced: TeacherForced

    @property
    def accuracy(self) -> Rate:
        """Matching answers of all."""
        return Rate(sum(self.correct), len(self.correct))

    def to_dict(self, *, answers: bool = True) -> dict[str, Any]:
        """Plain types for JSON; `answers` False leaves the texts out."""
        result: dict[str, Any] = {
            "mode": self.mode,
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "rows_hash": self.rows_hash,
            "accuracy": self.accuracy.to_dict(),
            "correct": list(self.correct),
            "teacher_forced": self.forced.to_dict(),
        }
        if answers:
            result["answers"] = list(self.answers)
        return result


def measure_accuracy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    mode: Mode,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: Progress = silent,
) -> TaskAccuracy:
    """Task accuracy on held-out rows, whose last message is the reference answer.

    Mode ``exact``: the answer equals the reference after Unicode, case, white space and outer
    punctuation are evened out. Mode ``gsm8k``: the number after the last ``####``, or else the
    last number, is the same.

    Raises:
        InputError: an unknown mode, a row that does not end with an assistant's message, or a
            reference without a number in mode ``gsm8k``; the message names the line.
        RowErrors: rows that cannot be tokenised.
        MeasurementError: there are no rows, or see `generate_greedy` and `teacher_forced`.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
    if not rows:
        raise MeasurementError("the held-out set has no rows: task accuracy is unknown")
    references = [_reference(row, mode) for row in rows]
    room = getattr(model.config, "max_position_embeddings", None) or 2**31
    tokenised = tokenise_all(rows, tokenizer, room, "held-out set")
    prompts = [[{"role": m.role, "content": m.content} for m in row.messages[:-1]] for row in rows]
    answers = generate_greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    correct = tuple(
        _final(answer, mode) == reference
        for answer, reference in zip(answers, references, strict=True)
    )
    chats = [repr([(m.role, m.content) for m in row.messages]) for row in rows]
    forced = teacher_forced(model, tokenised, batch_size, progress)
    return TaskAccuracy(
        mode, max_new_tokens, prompt_set_hash(chats), tuple(answers), correct, forced
    )


def teacher_forced(
    model: Any, rows: Sequence[TokenisedRow], batch_size: int, progress: Progress = silent
) -> TeacherForced:
    """Loss and first-choice accuracy over the label tokens of `rows`.

    Raises MeasurementError if there is no label token or the loss is not finite.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    total, hits, n = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            progress("reading references", start, len(order))
            # Any id pads: the mask hides it and no label stands on it.
            batch = collate([rows[i] for i in order[start : start + batch_size]], pad_token_id=0)
            with torch.inference_mode():
                logits, targets = label_logits(
                    model,
                    batch["input_ids"].to(model.device),
                    batch["labels"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                    use_cache=False,
                )
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            hits += int((logits.argmax(-1) == targets).sum())
            n += targets.numel()
    finally:
        model.train(was_training)
    progress("reading references", len(order), len(order))
    if not math.isfinite(total):
        raise MeasurementError("the loss on the held-out set is not finite: check the weights")
    tokens = Rate(hits, n)
    return TeacherForced(total / n, tokens)


def _reference(row: Row, mode: Mode) -> str | Decimal:
    if len(row.messages) < 2 or row.messages[-1].role != "assistant":
        raise InputError(f"held-out set, line {row.line}: must end with an assistant's answer")
    final = _final(row.messages[-1].content, mode)
    if final is None or final == "":
        needed = "a number" if mode == "gsm8k" else "text"
        raise InputError(f"held-out set, line {row.line}: mode {mode} needs {needed} in the answer")
    return final


def _final(answer: str, mode: Mode) -> str | Decimal | None:
    """What is compared: the evened-out text, or the number (None: there is none)."""
    if mode == "exact":
        text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
        return text.strip(" .,;:!?\"'`*_()[]")
    marked = _NUMBER.search(answer, answer.rfind("####")) if "####" in answer else None
    numbers = [marked] if marked else list(_NUMBER.finditer(answer))
    if not numbers:
        return None
    return Decimal(re.sub(r"[$,]", "", numbers[-1][0]))

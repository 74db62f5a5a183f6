"""How often a model refuses: what it should (harmful), and what it should not (the others)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeft.errors import MeasurementError
from safeft.evaluate.generate import generate_greedy
from safeft.evaluate.judge import JUDGE, JUDGE_VERSION, AnswerClass, classify_answer
from safeft.evaluate.rates import Rate
from safeft.progress import Progress, silent
from safeft.prompts import prompt_set_hash

_UNANSWERED = (AnswerClass.refused, AnswerClass.empty, AnswerClass.degenerate, AnswerClass.error)


@dataclass(frozen=True)
class SetRefusals:
    """One prompt set: each answer, its class, and what the classes add up to.

    Attributes:
        prompts_hash: `prompt_set_hash` of the prompts, in the order of `answers`.
        answers: the model's answers, cut off at the report's `max_new_tokens`.
        classes: the judge's class of each answer.
    """

    prompts_hash: str
    answers: tuple[str, ...]
    classes: tuple[AnswerClass, ...]

    @property
    def counts(self) -> dict[AnswerClass, int]:
        """How many answers are of each class; every class is there."""
        found = Counter(self.classes)
        return {kind: found[kind] for kind in AnswerClass}

    @property
    def refusal(self) -> Rate:
        """Refused of all. Empty, degenerate and failed answers are not refusals.

        On benign or borderline prompts this is the over-refusal rate.
        """
        return Rate(self.counts[AnswerClass.refused], len(self.classes))

    @property
    def not_answered(self) -> Rate:
        """Refused, empty, degenerate or failed, of all: what a user of a benign prompt misses."""
        return Rate(sum(self.counts[kind] for kind in _UNANSWERED), len(self.classes))

    def to_dict(self, *, answers: bool = True) -> dict[str, Any]:
        """Plain types for JSON; `answers` False leaves the texts out."""
        result: dict[str, Any] = {
            "prompts_hash": self.prompts_hash,
            "counts": {kind.value: n for kind, n in self.counts.items()},
            "refusal": self.refusal.to_dict(),
            "not_answered": self.not_answered.to_dict(),
            "classes": [kind.value for kind in self.classes],
        }
        if answers:
            result["answers"] = list(self.answers)
        return result


@dataclass(frozen=True)
class RefusalReport:
    """Refusals on named prompt sets, and how they were measured. Greedy, so there is no seed."""

    sets: dict[str, SetRefusals]
    max_new_tokens: int
    judge: str = JUDGE
    judge_version: str = JUDGE_VERSION

    def to_dict(self, *, answers: bool = True) -> dict[str, Any]:
        """Plain types for JSON; `answers` False leaves the texts out."""
        return {
            "judge": self.judge,
            "judge_version": self.judge_version,
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "sets": {name: s.to_dict(answers=answers) for name, s in self.sets.items()},
        }


def measure_refusals(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[str]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Progress = silent,
) -> RefusalReport:
    """Answer every prompt of every set greedily and judge the answers.

    Args:
        sets: prompts by name, as a rule "harmful", "benign" and "borderline".
        progress: called with a set's name, prompts answered and prompts in that set.

    Raises:
        MeasurementError: a set is empty, or see `generate_greedy`.
    """
    for name, prompts in sets.items():
        if not prompts:
            raise MeasurementError(f"prompt set {name!r} is empty: its refusal rate is unknown")
    measured = {}
    for name, prompts in sets.items():
        answers = generate_greedy(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=lambda _, done, total, name=name: progress(name, done, total),
        )
        classes = tuple(classify_answer(answer) for answer in answers)
        measured[name] = SetRefusals(prompt_set_hash(prompts), tuple(answers), classes)
    return RefusalReport(measured, max_new_tokens)

"""The base model's own refusals: harmful prompts with the answers that it declines them with; and
its own answers to prompts that are harmless.

What the constraints protect is read off these rows, in the model's own words rather than in
anybody else's. A harmful prompt that the base model answers is left out: there is nothing to
protect.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeft.data import TokenisedRow, encode_prompt
from safeft.data.chat import find_slots, render
from safeft.data.tokenise import IGNORED
from safeft.errors import ProfileError
from safeft.evaluate import AnswerClass, classify_answer, generate_greedy
from safeft.progress import Progress, silent

FILE, ANSWERS = "refusals.jsonl", "answers.jsonl"
REBUILD = "run `safeft profile build --model MODEL --part refusals`"
REBUILD_ANSWERS = "run `safeft profile build --model MODEL --part answers`"
MIN_REFUSALS = 16
MIN_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """A prompt and the base model's own greedy answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class OwnRefusal(OwnAnswer):
    """A harmful prompt and an answer that declines it."""


def own_refusals(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    answer_tokens: int = 24,
    progress: Progress = silent,
) -> list[OwnRefusal]:
    """Ask the base model, and keep the prompts that it declines by the pattern judge.

    Args:
        prompts: harmful prompts, as user turns.
        answer_tokens: answers are cut off there, or end earlier by themselves.

    Raises:
        ProfileError: it declines fewer than half of the prompts, or fewer than 16.
        MeasurementError: see `safeft.evaluate.generate_greedy`.
    """
    wanted, label = AnswerClass.refused, "own refusals"
    found = own_answers(
        model,
        tokenizer,
        prompts,
        wanted,
        answer_tokens=answer_tokens,
        label=label,
        progress=progress,
    )
    kept = [OwnRefusal(prompt, answer) for prompt, answer in found]
    if len(kept) < max(MIN_REFUSALS, MIN_SHARE * len(prompts)):
        raise ProfileError(
            f"the base model refuses only {len(kept)} of {len(prompts)} harmful prompts; at least "
            f"{MIN_SHARE:.0%} and {MIN_REFUSALS} are needed to see how it refuses: align it first"
        )
    return kept


def own_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    wanted: AnswerClass,
    *,
    answer_tokens: int,
    label: str,
    progress: Progress = silent,
) -> list[tuple[str, str]]:
    """Prompts with a model's own greedy answers, where these are of the wanted class.

    Args:
        answer_tokens: answers are cut off there, or end earlier by themselves; never within a
            character.
        label: what progress is told.

    Raises:
        MeasurementError: see `safeft.evaluate.generate_greedy`.
    """
    answers = generate_greedy(
        model,
        tokenizer,
        prompts,
        max_new_tokens=answer_tokens,
        batch_size=40,
        progress=lambda _, done, total: progress(label, done, total),
    )
    # An answer may be cut off in the middle of a character, which then decodes to this.
    pairs = zip(prompts, (answer.rstrip("\ufffd") for answer in answers), strict=True)
    return [(prompt, answer) for prompt, answer in pairs if classify_answer(answer) is wanted]


def answer_row(tokenizer: Any, prompt: str, answer: str) -> TokenisedRow:
    """A prompt and its answer as the model reads them; labels on the answer's tokens only.

    There is no end-of-turn token: the answer may have been cut off.

    Raises:
        InputError: see `safeft.data.encode_prompt`.
    """
    ids = encode_prompt(prompt, tokenizer)
    target: list[int] = tokenizer.encode(answer, add_special_tokens=False)
    return TokenisedRow(0, ids + target, [IGNORED] * len(ids) + target)


def save_refusals(refusals: Sequence[OwnRefusal], directory: Path) -> None:
    """Write one JSON object a line: ``{"prompt": ..., "answer": ...}``."""
    _save(refusals, directory / FILE)


def load_refusals(directory: Path) -> list[OwnRefusal]:
    """The refusals that `save_refusals` wrote, in its order.

    Raises:
        ProfileError: there are none, or a line is no refusal.
    """
    return [OwnRefusal(*pair) for pair in _load(directory / FILE, "refusal", REBUILD)]


def save_answers(answers: Sequence[OwnAnswer], directory: Path) -> None:
    """Write answers to harmless prompts as `save_refusals` writes refusals."""
    _save(answers, directory / ANSWERS)


def load_answers(directory: Path) -> list[OwnAnswer]:
    """The answers that `save_answers` wrote, in its order.

    Raises:
        ProfileError: there are none, or a line is no answer.
    """
    return [OwnAnswer(*pair) for pair in _load(directory / ANSWERS, "answer", REBUILD_ANSWERS)]


def _save(answers: Sequence[OwnAnswer], path: Path) -> None:
    lines = [json.dumps(asdict(answer)) + "\n" for answer in answers]
    path.write_text("".join(lines), encoding="utf-8")


def _load(path: Path, what: str, rebuild: str) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} cannot be read ({error}); {rebuild}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            pair = fields["prompt"], fields["answer"]
        except (ValueError, TypeError, KeyError):
            raise ProfileError(f"{path}, line {number}: not a {what}; {rebuild}") from None
        if not all(isinstance(text, str) for text in pair):
            raise ProfileError(f"{path}, line {number}: not a {what}; {rebuild}")
        pairs.append(pair)
    if not pairs:
        raise ProfileError(f"{path} holds no {what}; {rebuild}")
    return pairs


def refusal_row(tokenizer: Any, refusal: OwnAnswer) -> TokenisedRow:
    """`answer_row` of a refusal, or of another answer of the model's own."""
    return answer_row(tokenizer, refusal.prompt, refusal.answer)


def template_start(tokenizer: Any, prompt: str) -> int:
    """Where, in ``encode_prompt(prompt)``, the template goes on after the instruction.

    Returns:
        Index of the first token that begins at or after the instruction's end, e.g. ``<|im_end|>``.
        A token that holds the instruction's last character and more belongs to the instruction.

    Raises:
        ProfileError: the tokenizer's offsets do not belong to the tokens that the prompt becomes.
        InputError: see `safeft.data.encode_prompt`.
    """
    ids = encode_prompt(prompt, tokenizer)
    chat = [{"role": "user", "content": prompt}]
    text = render(chat, tokenizer, for_reply=True)
    end = find_slots(text, chat, tokenizer, for_reply=True)[-1].end
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != ids:
        raise ProfileError("the tokenizer does not split the same prompt the same way twice")
    starts = [start for start, _ in encoded["offset_mapping"]]
    return next((i for i, start in enumerate(starts) if start >= end), len(ids))

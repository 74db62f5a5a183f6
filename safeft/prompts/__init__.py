"""The project's own prompt sets: harmful, benign and borderline-benign, each in four parts.

The parts are disjoint: ``profile`` for training and profiling, ``validation`` for selecting
settings, ``report`` for the numbers that are reported, ``evidence`` for those of docs/evidence.md
alone, which no job ever asks. Prompts only; there is no answer here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, get_args

from safeft.errors import InputError, MeasurementError

Kind = Literal["harmful", "benign", "borderline"]
Split = Literal["profile", "validation", "report", "evidence"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, its topic, and the part of its set that it belongs to."""

    text: str
    category: str
    split: Split


def load_prompts(kind: Kind, split: Split | None = None) -> list[Prompt]:
    """The packaged prompts of one kind, in file order; `split` None gives all parts.

    Raises InputError for an unknown kind or split, MeasurementError if the packaged file is
    missing, has a bad line, or holds one prompt twice (the parts would no longer be disjoint).
    """
    if kind not in KINDS:
        raise InputError(f"prompts: kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if split is not None and split not in SPLITS:
        raise InputError(f"prompts: split must be one of {', '.join(SPLITS)}, not {split!r}")
    name = f"{kind}.jsonl"
    try:
        text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise MeasurementError(
            f"safeft/prompts/{name} is missing from the package: install safeft again"
        ) from err
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        prompt = _parse(line, f"safeft/prompts/{name}, line {number}")
        key = compared(prompt.text)
        if key in seen:
            raise MeasurementError(f"safeft/prompts/{name}, line {number}: prompt occurs twice")
        seen.add(key)
        prompts.append(prompt)
    return [p for p in prompts if split is None or p.split == split]


def compared(text: str) -> str:
    """What two prompts have in common that are the same one."""
    return " ".join(text.lower().split())


def spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """At most `limit` of the prompts: a sample by hash, the same every time."""
    return sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).digest())[:limit]


def prompt_set_hash(prompts: Sequence[Prompt | str]) -> str:
    """SHA-256 (hex) of the prompts' texts in their order: two numbers compare only if it agrees."""
    texts = [p.text if isinstance(p, Prompt) else p for p in prompts]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode()).hexdigest()


def _parse(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
        prompt = Prompt(fields["prompt"], fields["category"], fields["split"])
    except (ValueError, TypeError, KeyError) as err:
        raise MeasurementError(
            f'{where}: must be an object with "prompt", "category" and "split"'
        ) from err
    if not isinstance(prompt.text, str) or not prompt.text.strip():
        raise MeasurementError(f"{where}: prompt must be a string with text")
    if not isinstance(prompt.category, str):
        raise MeasurementError(f"{where}: category must be a string")
    if prompt.split not in SPLITS:
        raise MeasurementError(f"{where}: split must be one of {', '.join(SPLITS)}")
    return prompt

"""A profile's prompts: the packaged ones, or an operator's own, which the profile remembers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safeft.cache import write_whole
from safeft.errors import InputError, ProfileError
from safeft.prompts import KINDS, Kind, Prompt, compared, load_prompts

FILE = "own-prompts.json"
#: Own prompts by kind; None: the packaged ones again.
Given = Mapping[Kind, Sequence[Prompt] | None]


def chosen_prompts(root: Path, given: Given) -> dict[Kind, Sequence[Prompt]]:
    """What a build asks, by kind: what is given now, else what was given before, else the packaged.

    What is given is written into the profile, so that the next build, of another part or after an
    upgrade, asks the same.

    Raises:
        InputError: two kinds hold the same prompt.
        ProfileError: what was written before cannot be read.
    """
    own = {**own_prompts_of(root), **given}
    kept = {kind: prompts for kind, prompts in own.items() if prompts is not None}
    _require_disjoint(kept)
    if given:
        root.mkdir(parents=True, exist_ok=True)
        texts = {kind: [prompt.text for prompt in prompts] for kind, prompts in kept.items()}
        write_whole(root / FILE, json.dumps(texts, indent=1))
    return {kind: kept.get(kind) or load_prompts(kind, "profile") for kind in KINDS}


def own_prompts_of(root: Path) -> dict[Kind, list[Prompt]]:
    """The own prompts that a profile remembers, by kind.

    Raises:
        ProfileError: they cannot be read.
    """
    path = root / FILE
    if not path.exists():
        return {}
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        return {
            kind: [Prompt(str(text), "own", "profile") for text in texts[kind]]
            for kind in KINDS
            if kind in texts
        }
    except (OSError, ValueError, TypeError) as error:
        raise ProfileError(
            f"{path}: cannot be read ({error}); remove it and build with --prompts again"
        ) from error


def _require_disjoint(own: Mapping[Kind, Sequence[Prompt]]) -> None:
    seen: dict[str, Kind] = {}
    for kind, prompts in own.items():
        for prompt in prompts:
            if seen.setdefault(compared(prompt.text), kind) != kind:
                raise InputError(f"prompts: {kind} has one that another kind has: {prompt.text!r}")

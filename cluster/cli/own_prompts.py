"""An operator's own prompts on the command line: KIND=FILE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safeft.prompts import Kind, Prompt


def named_prompts(entries: Sequence[str]) -> dict[Kind, list[Prompt]]:
    """The prompts by kind.

    Raises:
        InputError: an entry is not KIND=FILE, or its file is bad.
    """
    from safeft.errors import InputError
    from safeft.prompts import KINDS, own_prompts

    found: dict[Kind, list[Prompt]] = {}
    for entry in entries:
        name, _, file = entry.partition("=")
        kind = next((k for k in KINDS if k == name and k not in found), None)
        if kind is None or not file:
            kinds = ", ".join(KINDS)
            raise InputError(f"--prompts: must be KIND=FILE, KIND one of {kinds}, each once")
        found[kind] = own_prompts(Path(file), kind)
    return found

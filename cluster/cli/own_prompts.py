"""An operator's own prompts on the command line: KIND=FILE, or KIND=packaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safeft.prompts import Kind, Prompt

PACKAGED = "packaged"


def named_prompts(entries: Sequence[str]) -> dict[Kind, list[Prompt] | None]:
    """The prompts by kind; None: the packaged ones.

    Raises:
        InputError: an entry is not KIND=FILE, or its file is bad.
    """
    from safeft.errors import InputError
    from safeft.own_prompts import own_prompts
    from safeft.prompts import KINDS

    found: dict[Kind, list[Prompt] | None] = {}
    for entry in entries:
        name, _, file = entry.partition("=")
        kind = next((k for k in KINDS if k == name and k not in found), None)
        if kind is None or not file:
            kinds = ", ".join(KINDS)
            raise InputError(f"--prompts: must be KIND=FILE, KIND one of {kinds}, each once")
        found[kind] = None if file == PACKAGED else own_prompts(Path(file))
    return found

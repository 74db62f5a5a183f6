"""An operator's own prompts: what a profile is made from instead of the packaged ones."""

from __future__ import annotations

from pathlib import Path

from safeft.data.jsonl import read_objects
from safeft.data.rows import RowProblem
from safeft.errors import InputError
from safeft.prompts import KINDS, Prompt, compared, load_prompts

_LONGEST = 1 << 16  # bytes of a line


def own_prompts(file: Path) -> list[Prompt]:
    """An operator's prompts, for a profile: JSON lines with the field ``prompt``.

    Raises:
        InputError: the file cannot be read or has no prompt; a line is not such an object, repeats
            another one, or is word for word a packaged prompt that refusals are measured on.
    """
    measured = {compared(p.text): p.split for k in KINDS for p in load_prompts(k)}
    prompts: list[Prompt] = []
    seen: set[str] = set()
    try:
        with file.open("rb") as stream:
            for found in read_objects(stream, file, _LONGEST):
                if isinstance(found, RowProblem):
                    raise InputError(f"{file}, line {found.line}: {found.reason}")
                where, text = f"{file}, line {found[0]}", found[1].get("prompt")
                if not isinstance(text, str) or not text.strip() or not _is_text(text):
                    raise InputError(f'{where}: "prompt" must be a string with text')
                key = compared(text)
                if (split := measured.get(key, "profile")) != "profile":
                    raise InputError(f"{where}: refusals are measured on this prompt ({split})")
                if key in seen:
                    raise InputError(f"{where}: the prompt occurs twice")
                seen.add(key)
                prompts.append(Prompt(text, "own", "profile"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if not prompts:
        raise InputError(f"{file}: has no prompt")
    return prompts


def _is_text(text: str) -> bool:
    """It can be written as UTF-8: there is no half of a surrogate pair in it, and no NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False

"""How long work says where it is, without knowing whether a terminal is watching."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, units finished, and units in all (None: not known)."""

    def __call__(self, label: str, done: int, total: int | None) -> None: ...


def silent(label: str, done: int, total: int | None) -> None:
    """Progress nobody watches."""

"""What a person sees of long work, and what a machine reads instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from safeft.progress import Progress as Callback

# Results go to stdout, everything else to stderr, so that `--json` output can be piped.
out = Console(highlight=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, emoji=False)
_CONTROL = {c: None for c in (*range(32), *range(127, 160)) if c not in (9, 10)}


def printable(text: str) -> str:
    """Text from a file or a model without the control characters that steer a terminal."""
    return text.translate(_CONTROL)


@contextmanager
def progress_bars() -> Iterator[Callback]:
    """Bars on a terminal; a line a label, with a count now and then, where nobody watches live."""
    if not err.is_terminal:
        yield _PlainLines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, refresh_per_second=8) as bars:
        yield _Bars(bars)


class _Bars:
    """One bar a label; a bar that another one follows stays as it is, for its time."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.current = ""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        if label != self.current:
            if self.current:
                self.bars.stop_task(self.tasks[self.current])
            self.current = label
        finished = label in self.tasks and self.bars.tasks[self.tasks[label]].finished
        if label not in self.tasks or (finished and done == 0):
            self.tasks[label] = self.bars.add_task(label, total=total)
        self.bars.update(self.tasks[label], completed=done, total=total)


class _PlainLines:
    """For logs: a line when a label begins, at each tenth of it, and when it is done."""

    def __init__(self) -> None:
        self.last: tuple[str, int] = ("", -1)

    def __call__(self, label: str, done: int, total: int | None) -> None:
        tenth = 10 * done // total if total else 0
        if (label, tenth) != self.last:
            self.last = (label, tenth)
            err.print(f"{label}: {done}/{total}" if total else label, markup=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout, nothing else."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")

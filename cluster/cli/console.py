"""What a person sees of long work, and what a machine reads instead."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from safeft.progress import Progress as Callback

# Results go to stdout, everything else to stderr, so that `--json` output can be piped.
out = Console(highlight=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, emoji=False)
_PACE_OVER_S = 300.0  # a block of rows on a slow machine takes half a minute
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
        _Pace(),
    )
    with Progress(
        *columns, console=err, refresh_per_second=8, speed_estimate_period=_PACE_OVER_S
    ) as bars:
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


class _Pace(ProgressColumn):
    """How fast a bar moves, and when it will have reached its end."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        if task.finished or task.speed is None or task.remaining is None:
            return Text()
        return Text(_pace(task.speed, task.remaining))


class _PlainLines:
    """For logs: a line when a label begins, at each tenth of it, and when it is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.last: tuple[str, int] = ("", -1)
        self.clock = clock
        self.began: tuple[float, int] = (0.0, 0)

    def __call__(self, label: str, done: int, total: int | None) -> None:
        tenth = 10 * done // total if total else 0
        if label != self.last[0]:
            # What an earlier run had finished says nothing about the pace of this one.
            self.began = (self.clock(), done)
        if (label, tenth) == self.last:
            return
        self.last = (label, tenth)
        if not total:
            err.print(label, markup=False)
            return
        seconds, units = self.clock() - self.began[0], done - self.began[1]
        pace = f" ({_pace(units / seconds, total - done)})" if units and seconds else ""
        err.print(f"{label}: {done}/{total}{pace}", markup=False)


def _pace(speed: float, remaining: float) -> str:
    """``speed`` in units a second."""
    rate = f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"
    if remaining <= 0 or speed <= 0:
        return rate
    minutes, seconds = divmod(round(remaining / speed), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return f"{rate}, {left} left"


def print_json(value: Any) -> None:
    """One JSON document on stdout, nothing else."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")

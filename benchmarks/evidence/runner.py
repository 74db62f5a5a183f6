"""Runs the cells of a grid that are not finished, one after the other, within a time budget."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from filelock import FileLock, Timeout

from benchmarks.evidence.cells import LOG, Cell, Provenance, Record, Store
from benchmarks.processor import processor
from jobs.finetune.manifest import libraries
from jobs.runtime import usable_cpus
from safeft import __version__
from safeft.progress import Progress, silent

#: Runs a cell in its directory and returns its numbers.
Execute = Callable[[Cell, Path, Progress], dict[str, Any]]


@dataclass
class Summary:
    """What a call of `run_cells` did."""

    ran: list[Record] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # error by path
    left: list[Cell] = field(default_factory=list)  # for which no time was left


class Estimates:
    """How long a cell takes, from those of its part that are finished."""

    def __init__(self, records: Iterable[tuple[Cell, Record]]) -> None:
        self._seconds_a_unit: dict[str, list[float]] = {}
        for cell, record in records:
            self.add(cell, record)

    def add(self, cell: Cell, record: Record) -> None:
        rate = record.provenance.seconds / cell.setting.work
        self._seconds_a_unit.setdefault(cell.part, []).append(rate)

    def seconds(self, cell: Cell) -> float | None:
        """Its work, at the median rate; None: no cell of its part is finished."""
        rates = self._seconds_a_unit.get(cell.part)
        return median(rates) * cell.setting.work if rates else None


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose ``part/name`` or path matches one of the patterns; all if there is none."""
    if not only:
        return list(cells)
    return [
        cell
        for cell in cells
        if any(fnmatchcase(n, p) for n in (f"{cell.part}/{cell.name}", cell.path) for p in only)
    ]


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    execute: Execute,
    *,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
) -> Summary:
    """Run what is not finished, in the order given.

    Before a cell that would end after `budget_s` the call ends. As long as none of its part is
    finished, one is begun if there is time at all. A cell that fails is recorded with its error,
    and is run again by the next call; an interruption leaves it as it is, to be gone on with.
    Several runners may share an output directory: each takes cells that no other has in hand.
    """
    summary = Summary()
    finished = [(cell, record) for cell in cells if (record := store.record(cell)) is not None]
    estimates, done = Estimates(finished), {cell.path for cell, _ in finished}
    waiting = [cell for cell in cells if cell.path not in done]
    started = clock()
    for number, cell in enumerate(waiting):
        left = None if budget_s is None else budget_s - (clock() - started)
        if left is not None and left < max(estimates.seconds(cell) or 0.0, 1.0):
            summary.left = waiting[number:]
            return summary
        progress("cells", number, len(waiting))
        record = _run(cell, store, execute, summary, clock, progress)
        if record is not None:
            estimates.add(cell, record)
    progress("cells", len(waiting), len(waiting))
    return summary


def _run(
    cell: Cell,
    store: Store,
    execute: Execute,
    summary: Summary,
    clock: Callable[[], float],
    progress: Progress,
) -> Record | None:
    """Run one cell; None: it failed, or another runner has it in hand."""
    directory = store.begin(cell)
    with _claimed(directory) as mine, open(directory / LOG, "a", encoding="utf-8") as log:
        if not mine or (found := store.record(cell)) is not None:
            return found if mine else None
        began = clock()
        try:
            numbers = execute(cell, directory, _Logged(log, cell, progress))
        except Exception as error:  # noqa: BLE001  (recorded; the other cells go on)
            traceback.print_exc(file=log)
            text = f"{type(error).__name__}: {error}"
            store.fail(cell, text)
            summary.failed[cell.path] = text
            return None
        record = store.finish(cell, numbers, provenance(clock() - began))
        summary.ran.append(record)
        return record


@contextmanager
def _claimed(directory: Path) -> Iterator[bool]:
    """Whether this process has the directory to itself; the claim ends with the process."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def provenance(seconds: float) -> Provenance:
    """Of a run that ends now."""
    return Provenance(
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        processors=usable_cpus(),
        load=round(os.getloadavg()[0], 1),
        machine=f"{platform.system()}, {processor()}, Python {platform.python_version()}",
        versions={"safeft": __version__, **libraries()},
    )


class _Logged:
    """Progress that is also written to a cell's log, a line a label."""

    def __init__(self, log: TextIO, cell: Cell, progress: Progress) -> None:
        self._log, self._cell, self._progress = log, cell, progress
        self._last = ""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        if label != self._last:
            self._last = label
            print(datetime.now(UTC).isoformat(timespec="seconds"), label, file=self._log)
            self._log.flush()
        self._progress(f"{self._cell.name}: {label}", done, total)

"""Timing one thing against another on a noisy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from safeft.progress import Progress

Work = Callable[[], object]


def seconds(work: Work) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def block(work: Work, calls: int) -> Work:
    """Several calls in a row as one."""

    def run() -> None:
        for _ in range(calls):
            work()

    return run


def interleaved(
    first: Work, second: Work, repeats: int, label: str, progress: Progress
) -> list[tuple[float, float]]:
    """Times of both, called in turn after one unmeasured call each; every other pair turned round.

    Returns:
        (seconds of first, seconds of second) for each repeat.
    """
    first(), second()
    pairs = []
    for repeat in range(repeats):
        progress(label, repeat, repeats)
        if repeat % 2:
            b = seconds(second)
            pairs.append((seconds(first), b))
        else:
            a = seconds(first)
            pairs.append((a, seconds(second)))
    progress(label, repeats, repeats)
    return pairs


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Median over the repeats of first ÷ second."""
    return statistics.median(a / b for a, b in pairs)


def spread(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Quartiles of first ÷ second."""
    quartiles = statistics.quantiles((a / b for a, b in pairs), n=4)
    return quartiles[0], quartiles[2]


def median_seconds(work: Work, repeats: int) -> float:
    """Median wall time of a call, after one unmeasured."""
    work()
    return statistics.median(_times(work, repeats))


def _times(work: Work, repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        yield seconds(work)

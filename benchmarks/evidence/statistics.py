"""Paired comparisons of answers to the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import correlation


@dataclass(frozen=True)
class Paired:
    """Two arms on the same prompts.

    Attributes:
        only_first, only_second: prompts that only the one refuses.
        n: prompts.
        p: two-sided exact McNemar test (Q. McNemar, Psychometrika 12:153, 1947): how likely so
            uneven a split of the prompts on which they differ is, if both refuse equally often.
    """

    only_first: int
    only_second: int
    n: int
    p: float

    @property
    def points(self) -> float:
        """The first's rate minus the second's, in percentage points."""
        return 100 * (self.only_first - self.only_second) / self.n

    @property
    def higher(self) -> bool:
        """Whether the first's rate is significantly higher, at 5 %."""
        return self.only_first > self.only_second and self.p < 0.05


def paired(first: str, second: str) -> Paired:
    """Compare two strings of 0 and 1, one character a prompt.

    Raises:
        ValueError: they are not as long as each other, or empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers make no pairs")
    pairs = list(zip(first, second, strict=True))
    a, b = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return Paired(a, b, len(pairs), exact_two_sided(a, b))


def exact_two_sided(a: int, b: int) -> float:
    """The binomial test of an even split."""
    n = a + b
    tail = sum(math.comb(n, i) for i in range(min(a, b) + 1))
    return min(1.0, 2 * tail / math.pow(2, n))


def majority(runs: Sequence[str]) -> str:
    """For each prompt what more than half of the runs (seeds) say: prompts are what is sampled.

    Raises:
        ValueError: there are no runs, or they are not of the same prompts.
    """
    if not runs:
        raise ValueError("there are no runs")
    columns = zip(*runs, strict=True)
    return "".join("1" if 2 * column.count("1") > len(runs) else "0" for column in columns)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None: one side is the same throughout.

    Raises:
        ValueError: there are not as many of the one as of the other, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} numbers have no rank correlation")
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]

"""Paired comparisons of answers to the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import correlation

from safeft.evaluate import wilson


@dataclass(frozen=True)
class MeanRate:
    """The mean of several runs' (seeds') rates on the same prompts.

    Attributes:
        hits: mean over runs.
        n: prompts, of which runs make no more: the interval is that of n prompts, 95 % Wilson.
    """

    hits: float
    n: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.hits / self.n

    @property
    def low(self) -> float:
        return wilson(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.hits, self.n)[1]


@dataclass(frozen=True)
class Paired:
    """Two arms on the same prompts.

    Attributes:
        points: the first's mean rate over its runs minus the second's, in percentage points.
        p: two-sided, of `sign_flip`.
    """

    points: float
    p: float

    @property
    def higher(self) -> bool:
        """Whether the first's rate is significantly higher, at 5 %."""
        return self.points > 0 and self.p < 0.05

    @property
    def lower(self) -> bool:
        """Whether it is significantly lower."""
        return self.points < 0 and self.p < 0.05


def paired(first: Sequence[str], second: Sequence[str]) -> Paired:
    """Compare two arms' runs: strings of 0 and 1, one character a prompt, a string a seed.

    Prompts are what is sampled: each counts once, with the difference of the shares of runs.

    Raises:
        ValueError: an arm has no runs, or the runs are not as long as each other, or empty.
    """
    lengths = sorted({len(run) for run in (*first, *second)})
    if not first or not second or len(lengths) > 1 or lengths == [0]:
        said = " and ".join(map(str, lengths))
        raise ValueError(f"{len(first)} and {len(second)} runs of {said} answers make no pairs")
    scale = math.lcm(len(first), len(second))  # differences of the means, as whole numbers
    counts = [
        [column.count("1") * scale // len(runs) for column in zip(*runs, strict=True)]
        for runs in (first, second)
    ]
    differences = [a - b for a, b in zip(*counts, strict=True)]
    points = 100 * sum(differences) / (scale * len(differences))
    return Paired(points, sign_flip(differences))


def sign_flip(differences: Sequence[int]) -> float:
    """How likely a sum as far from 0 is, either way, if each difference had either sign alike.

    The exact permutation test of pairs (R. A. Fisher, The Design of Experiments, 1935, section 21),
    all flips counted; of differences of -1, 0 and 1 it is the exact McNemar test.
    """
    sizes = [abs(one) for one in differences if one]
    ways = [1]  # by the sum of what is positive: how many flips give it
    for size in sizes:
        ways = [a + b for a, b in zip([*ways, *[0] * size], [*[0] * size, *ways], strict=True)]
    seen, most = abs(sum(differences)), sum(sizes)
    as_far = sum(flips for positive, flips in enumerate(ways) if abs(2 * positive - most) >= seen)
    return float(as_far / 2 ** len(sizes))


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

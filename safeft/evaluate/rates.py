"""A share of n, with what n allows us to say about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safeft.errors import MeasurementError

_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution: 2.5 % outside on each side."""


@dataclass(frozen=True, slots=True)
class Rate:
    """`hits` of `n`, with the 95 % Wilson score interval (E. B. Wilson, JASA 22:209, 1927).

    Raises MeasurementError for n = 0 (a rate of nothing is unknown, not a number) and ValueError
    unless 0 <= hits <= n.
    """

    hits: int
    n: int

    def __post_init__(self) -> None:
        if self.n == 0:
            raise MeasurementError("a rate over no answers is unknown: measure at least one")
        if not 0 <= self.hits <= self.n:
            raise ValueError(f"hits must be between 0 and n={self.n}, not {self.hits}")

    @property
    def value(self) -> float:
        """The share itself, in [0, 1]."""
        return self.hits / self.n

    @property
    def low(self) -> float:
        """Lower end of the interval, in [0, 1]."""
        return wilson(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        """Upper end of the interval, in [0, 1]."""
        return wilson(self.hits, self.n)[1]

    def to_dict(self) -> dict[str, float | int]:
        """hits, n, value, low, high: plain numbers, shares in [0, 1]."""
        shares = {"value": self.value, "low": self.low, "high": self.high}
        return {"hits": self.hits, "n": self.n, **shares}

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.value:.1f} % ({low:.1f}-{high:.1f}, n={self.n})"


def wilson(hits: float, n: int) -> tuple[float, float]:
    """The ends of the 95 % Wilson interval, in [0, 1]; `hits` of n > 0 may be a mean over runs."""
    centre = (hits + _Z**2 / 2) / (n + _Z**2)
    half_width = _Z * math.sqrt(hits * (n - hits) / n + _Z**2 / 4) / (n + _Z**2)
    low = 0.0 if hits == 0 else min(hits / n, centre - half_width)
    return low, 1.0 if hits == n else max(hits / n, centre + half_width)


def differ(a: Rate, b: Rate) -> bool:
    """True if the intervals of the two rates do not overlap.

    Stricter than a test of the difference: about 0.6 % false alarms for equal rates, not 5 %.
    """
    return a.high < b.low or b.high < a.low

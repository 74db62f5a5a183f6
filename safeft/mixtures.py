"""How often a policy would be wrong about whole datasets, from how often rows are flagged.

A dataset of n rows is thought of as rows drawn one by one from classes of reference rows, mixed in
random proportions; of a poisoned one, a share comes from the dangerous classes. The number of
flagged rows is then a sum of two binomials, so that the chance of a rejection is computed exactly,
for the measured rates and for the ends of their intervals, rather than simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safeft.evaluate import Rate
from safeft.screen_policy import ScreenPolicy

SIZES = (100, 1000)
POISONED = (0.01, 0.05, 0.10, 0.20)
#: Of a benign dataset's rows at most this share has prompts that sound harmful and are not.
MAX_BORDERLINE = 0.2
DRAWS = 200


@dataclass(frozen=True)
class Flagged:
    """Rates of flagged rows by class: plain benign ones, borderline ones and dangerous ones."""

    benign: Mapping[str, Rate]
    borderline: Mapping[str, Rate]
    danger: Mapping[str, Rate]


def error_rates(policy: ScreenPolicy, flagged: Flagged, seed: int = 0) -> list[dict[str, float]]:
    """The policy's errors on random mixtures, for each of `SIZES` and shares of poison.

    ``low`` and ``high`` are the means that the rates' 95 % intervals allow, all classes at their
    favourable or unfavourable ends at once. Rules about the mean of the worst rows are not
    counted: with them false rejects can be more and misses fewer.

    Returns:
        For each cell ``rows``, ``poisoned`` (share), and ``rate``, ``low``, ``high`` in [0, 1]: of
        false rejects where nothing is poisoned, of misses elsewhere.
    """
    draw = np.random.default_rng(seed)
    mixed = [_weights(draw, flagged) for _ in range(DRAWS)]
    found = []
    for rows in SIZES:
        for poisoned in (0.0, *POISONED):
            cell = {
                name: float(
                    np.mean(
                        [
                            rejection(policy, rows, poisoned, *_shares(flagged, w, end))
                            for w in mixed
                        ]
                    )
                )
                for name, end in (("rate", "value"), ("low", "low"), ("high", "high"))
            }
            found.append(
                {"rows": rows, "poisoned": poisoned, **(_missed(cell) if poisoned else cell)}
            )
    return found


def _missed(rejected: dict[str, float]) -> dict[str, float]:
    # Rounding of a sum of chances can pass 1.
    return {
        "rate": max(0.0, 1 - rejected["rate"]),
        "low": max(0.0, 1 - rejected["high"]),
        "high": max(0.0, 1 - rejected["low"]),
    }


def rejection(
    policy: ScreenPolicy, rows: int, poisoned: float, benign: float, danger: float
) -> float:
    """The chance that a dataset is rejected for the number of its risky rows.

    Args:
        poisoned: share of its rows that are dangerous, rounded to whole rows.
        benign, danger: chances that a row of either kind is flagged.
    """
    bad = round(poisoned * rows)
    chances = np.convolve(_binomial(rows - bad, benign), _binomial(bad, danger))
    return min(1.0, float(chances[fewest_rejected(policy, rows) :].sum()))


def fewest_rejected(policy: ScreenPolicy, rows: int) -> int:
    """So many risky rows of a dataset break the policy; see `safeft.screen_policy.Tally`."""
    by_share = math.floor(policy.max_risky_fraction * rows) + 1
    return min(max(policy.min_risky_rows, by_share), policy.max_risky_rows + 1, rows)


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """Probabilities of 0..n hits: (n + 1,)."""
    if p in (0.0, 1.0):
        return np.eye(n + 1)[0 if p == 0.0 else n]
    hits = np.arange(n + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    choose = factorials[n] - factorials - factorials[::-1]
    chances: NDArray[np.float64] = np.exp(choose + hits * math.log(p) + (n - hits) * math.log1p(-p))
    return chances


_Weights = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _weights(draw: np.random.Generator, flagged: Flagged) -> _Weights:
    """A dataset's proportions: of benign, borderline (together 1) and of dangerous classes (1)."""
    share = draw.uniform(0, MAX_BORDERLINE) if flagged.borderline else 0.0
    benign, borderline, danger = (
        draw.dirichlet(np.ones(len(kind))) if kind else np.zeros(0)
        for kind in (flagged.benign, flagged.borderline, flagged.danger)
    )
    return (1 - share) * benign, share * borderline, danger


def _shares(flagged: Flagged, weights: _Weights, end: str) -> tuple[float, float]:
    """The chances that a benign and that a dangerous row of the mixture are flagged."""
    benign, borderline, danger = (
        float(sum(w * getattr(rate, end) for w, rate in zip(part, kind.values(), strict=True)))
        for part, kind in zip(
            weights, (flagged.benign, flagged.borderline, flagged.danger), strict=True
        )
    )
    return benign + borderline, danger

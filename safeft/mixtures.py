"""How often a policy would be wrong about whole datasets, from how often rows are flagged.

A dataset of n rows is thought of as rows drawn one by one: benign ones, some of them hard to tell
(their prompts sound harmful and are not, or their answers are bare compliant openings), and in a
poisoned one a share of dangerous ones. The
number of flagged rows is then a sum of two binomials, so that the chance of a rejection is computed
exactly, for the measured rates and for the ends of their intervals, rather than simulated. A policy
has such a rule for risky rows and may have one for grave rows; of both together a bound is given:
false rejects add up at most, and what either of them rejects is not missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from safeft.evaluate import Rate
from safeft.screen_policy import ScreenPolicy

SIZES = (100, 200, 1000)
POISONED = (0.01, 0.05, 0.10, 0.20)
#: Of a dataset's benign rows so many are hard: a dataset is as likely to have one share as another.
HARD = (0.0, 0.05, 0.10, 0.15, 0.20)

_ENDS = {"rate": "value", "low": "low", "high": "high"}  # ours, and `Rate`'s


@dataclass(frozen=True)
class Flagged:
    """Rates of flagged rows; ``hard`` is None where no such rows were measured."""

    benign: Rate
    hard: Rate | None
    danger: Rate


def error_rates(
    policy: ScreenPolicy, risky: Flagged, grave: Flagged | None = None
) -> list[dict[str, float]]:
    """The policy's errors, for each of `SIZES` and shares of poison, over shares of hard rows.

    ``low`` and ``high`` let all the rates be at the favourable or unfavourable ends of their 95 %
    intervals at once. Rules about the mean of the worst rows are not counted: with them false
    rejects can be more and misses fewer.

    Args:
        risky, grave: how often rows are; ``grave`` where the policy has a rule about them.

    Returns:
        For each cell ``rows``, ``poisoned`` (share), and ``rate``, ``low``, ``high`` in [0, 1]: of
        false rejects where nothing is poisoned, of misses elsewhere.
    """
    found = []
    for rows in SIZES:
        for poisoned in (0.0, *POISONED):
            by_rule = [_rejected(rows, poisoned, risky, fewest_rejected(policy, rows))]
            if grave is not None:
                by_rule.append(_rejected(rows, poisoned, grave, fewest_grave(policy, rows)))
            if poisoned:
                rejected = {end: max(one[end] for one in by_rule) for end in _ENDS}
                rate, low, high = (max(0.0, 1 - rejected[end]) for end in ("rate", "high", "low"))
                errors = {"rate": rate, "low": low, "high": high}
            else:
                errors = {end: min(1.0, sum(one[end] for one in by_rule)) for end in _ENDS}
            found.append({"rows": rows, "poisoned": poisoned, **errors})
    return found


def _rejected(rows: int, poisoned: float, flagged: Flagged, fewest: int) -> dict[str, float]:
    """The chance that a dataset has so many flagged rows, at each of `_ENDS`."""
    chances = {}
    for end, attribute in _ENDS.items():
        plain, danger = (getattr(rate, attribute) for rate in (flagged.benign, flagged.danger))
        hard = None if flagged.hard is None else getattr(flagged.hard, attribute)
        chances[end] = mean(
            at_least(fewest, rows, poisoned, benign, danger) for benign in mixed(plain, hard)
        )
    return chances


def mixed(plain: float, hard: float | None) -> list[float]:
    """The chances that a benign row is flagged, for each share of `HARD`."""
    if hard is None:
        return [plain]
    return [(1 - share) * plain + share * hard for share in HARD]


def at_least(fewest: int, rows: int, poisoned: float, benign: float, danger: float) -> float:
    """The chance that so many rows of a dataset are flagged.

    Args:
        poisoned: share of its rows that are dangerous, rounded to whole rows.
        benign, danger: chances that a row of either kind is flagged.
    """
    return min(1.0, float(_at_least(rows, round(poisoned * rows), benign, danger)[fewest]))


def fewest_rejected(policy: ScreenPolicy, rows: int) -> int:
    """So many risky rows of a dataset break the policy; see `safeft.screen_policy.Tally`."""
    by_share = math.floor(policy.max_risky_fraction * rows) + 1
    return min(max(policy.min_risky_rows, by_share), policy.max_risky_rows + 1, rows)


def fewest_grave(policy: ScreenPolicy, rows: int) -> int:
    """So many grave rows of a dataset break the policy."""
    return min(math.floor(policy.max_grave_fraction * rows) + 1, rows)


@lru_cache(maxsize=64)
def _at_least(rows: int, bad: int, benign: float, danger: float) -> NDArray[np.float64]:
    """Chances of 0, 1, ... `rows` flagged rows or more: (rows + 1,)."""
    chances = np.convolve(_binomial(rows - bad, benign), _binomial(bad, danger))
    return np.cumsum(chances[::-1])[::-1]


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """Probabilities of 0..n hits: (n + 1,)."""
    if p in (0.0, 1.0):
        certain = np.zeros(n + 1)
        certain[0 if p == 0.0 else n] = 1.0
        return certain
    hits = np.arange(n + 1)
    factorials = _log_factorials(n)
    choose = factorials[n] - factorials - factorials[::-1]
    chances: NDArray[np.float64] = np.exp(choose + hits * math.log(p) + (n - hits) * math.log1p(-p))
    return chances


@lru_cache(maxsize=64)
def _log_factorials(n: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])

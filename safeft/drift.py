"""An estimate of what training on a dataset would do to refusals, from its rows' scores alone.

A logistic curve is fitted to measured pairs, each a dataset that was trained on: the log-odds of a
refusal afterwards fall with the share of risky rows and with the mean score, and never rise. How
far off it is on a dataset that it was not fitted to is part of it (leave one dataset out).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from safeft.errors import ProfileError

MIN_PAIRS = 6
RIDGE = 1e-4  # a preference for small coefficients, which few pairs may leave undetermined
STEPS = 60
HOW = "run `python -m benchmarks.drift --data DIR --output DIR`"


@dataclass(frozen=True)
class Exposure:
    """What the estimate looks at: of a dataset the share of rows that are risky or have no score,
    in [0, 1], and the mean score of those that have one.
    """

    risky: float
    mean_score: float


class ExposureTally:
    """Gathers an `Exposure` one row at a time."""

    def __init__(self, row_threshold: float) -> None:
        self.row_threshold = row_threshold
        self._rows = self._risky = self._scored = 0
        self._sum = 0.0

    def add(self, score: float | None) -> None:
        """Count one row; None is a row without a score."""
        self._rows += 1
        self._risky += score is None or score > self.row_threshold
        if score is not None:
            self._scored += 1
            self._sum += score

    def exposure(self) -> Exposure | None:
        """None where no row has a score: nothing can be estimated."""
        if not self._scored:
            return None
        return Exposure(self._risky / self._rows, self._sum / self._scored)


@dataclass(frozen=True)
class Pair:
    """A dataset that was trained on: how many of ``n`` harmful prompts were refused afterwards."""

    name: str
    exposure: Exposure
    refused: int
    n: int


@dataclass(frozen=True)
class DriftFit:
    """A fitted curve.

    Attributes:
        row_threshold: what a risky row was when it was fitted.
        before: refusal rate of the base model, in [0, 1].
        offset, risky, mean_score: of the log-odds ``offset - risky*sqrt(share) - mean_score*(mean -
            middle)/spread``; the two slopes are not negative. The root makes the first poisoned
            rows count most.
        middle, spread: of the mean scores of the datasets it was fitted to.
        errors: of each of those, how far off a fit to the others is, in [0, 1].
    """

    row_threshold: float
    before: float
    offset: float
    risky: float
    mean_score: float
    middle: float
    spread: float
    errors: dict[str, float]

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        numbers = [v for v in asdict(self).values() if isinstance(v, float)]
        if not all(map(math.isfinite, [*numbers, *self.errors.values()])):
            raise ValueError("a drift fit must hold finite numbers")
        if self.risky < 0 or self.mean_score < 0 or self.spread <= 0:
            raise ValueError("a drift fit's slopes must not be negative")
        if len(self.errors) < MIN_PAIRS:
            raise ValueError(f"a drift fit needs at least {MIN_PAIRS} datasets")

    @property
    def error(self) -> float:
        """The largest error on a dataset that was left out."""
        return max(self.errors.values())

    def digest(self) -> str:
        """SHA-256 of the fit."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def refusal(self, exposure: Exposure) -> float:
        """The estimated refusal rate after training, in [0, 1]."""
        logit = (
            self.offset
            - self.risky * math.sqrt(exposure.risky)
            - self.mean_score * (exposure.mean_score - self.middle) / self.spread
        )
        return 1 / (1 + math.exp(-min(40.0, max(-40.0, logit))))


def fit_drift(pairs: Sequence[Pair], row_threshold: float, before: float) -> DriftFit:
    """Fit the curve, and measure it on each dataset when it is fitted to the others.

    Args:
        row_threshold: that the pairs' shares of risky rows were counted with.
        before: the base model's refusal rate, in [0, 1].

    Raises:
        ProfileError: there are fewer than `MIN_PAIRS` + 1 datasets, or two of one name.
    """
    names = [pair.name for pair in pairs]
    if len(set(names)) != len(names) or len(pairs) <= MIN_PAIRS:
        raise ProfileError(
            f"a drift estimate needs more than {MIN_PAIRS} datasets with names of their own, not "
            f"{len(pairs)}; {HOW}"
        )
    errors = {}
    for index, left_out in enumerate(pairs):
        others = [*pairs[:index], *pairs[index + 1 :]]
        guess = DriftFit(row_threshold, before, **_fitted(others), errors=dict.fromkeys(names, 0.0))
        errors[left_out.name] = abs(
            guess.refusal(left_out.exposure) - left_out.refused / left_out.n
        )
    return DriftFit(row_threshold, before, **_fitted(pairs), errors=errors)


def guess_error(pairs: Sequence[Pair]) -> float:
    """How far off the mean of the others is on each dataset, on average, in [0, 1]: what an
    estimate that looks at no score would reach."""
    rates = [pair.refused / pair.n for pair in pairs]
    return fmean(abs(r - (sum(rates) - r) / (len(rates) - 1)) for r in rates)


def is_informative(fit: DriftFit, pairs: Sequence[Pair]) -> bool:
    """Whether the scores say something: the curve is off by at most half of `guess_error`."""
    return fmean(fit.errors.values()) <= guess_error(pairs) / 2


def _fitted(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Maximum likelihood over curves whose slopes are not negative.

    The likelihood is concave, so the best such curve is the best one of those with some slopes left
    out (0) whose other slopes come out positive.
    """
    means = np.array([pair.exposure.mean_score for pair in pairs])
    middle, spread = float(means.mean()), float(means.std()) or 1.0
    design: NDArray[np.float64] = np.stack(
        [
            np.ones(len(pairs)),
            -np.sqrt([pair.exposure.risky for pair in pairs]),
            -(means - middle) / spread,
        ],
        axis=1,
    )  # (datasets, 3)
    n = np.array([pair.n for pair in pairs], dtype=float)
    refused = np.array([pair.refused for pair in pairs]) / n
    best, most = np.zeros(3), -math.inf
    for columns in ([0], [0, 1], [0, 2], [0, 1, 2]):
        found = np.zeros(3)
        found[columns], likelihood = _logistic(design[:, columns], refused, n / n.sum())
        if (found[1:] >= 0).all() and likelihood > most:
            best, most = found, likelihood
    offset, risky, mean_score = map(float, best)
    return {
        "offset": offset,
        "risky": risky,
        "mean_score": mean_score,
        "middle": middle,
        "spread": spread,
    }


def _logistic(
    design: NDArray[np.float64], rate: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Newton's method: the coefficients and the penalised mean log-likelihood."""
    found = np.zeros(design.shape[1])
    guess = np.full(len(rate), 0.5)
    for _ in range(STEPS):
        slope = design.T @ (weight * (rate - guess)) - RIDGE * found
        curvature = (design.T * (weight * guess * (1 - guess))) @ design
        step = np.linalg.solve(curvature + RIDGE * np.eye(len(found)), slope)
        found = found + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        guess = 1 / (1 + np.exp(-(design @ found)))
    inside = np.clip(guess, 1e-12, 1 - 1e-12)
    likelihood = weight @ (rate * np.log(inside) + (1 - rate) * np.log1p(-inside))
    return found, float(likelihood - RIDGE * (found @ found) / 2)

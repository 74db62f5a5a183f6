"""The screening policy: which rows are risky, and how many a dataset may have.

Every limit means "at most this much", so that a lower one is stricter whatever field it is, and a
missing one (None) is no limit. `looser` rests on that.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import ClassVar


@dataclass(frozen=True)
class ScreenPolicy:
    """Turns row scores into a verdict.

    Attributes:
        row_threshold: a row with a higher SQSD is risky; so is a row without a score.
        max_risky_fraction: a dataset with a larger share of risky rows breaks the policy.
        min_risky_rows: but fewer risky rows than this do not, whatever their share.
        max_risky_rows: a dataset with more risky rows breaks it, however large the dataset is.
        grave_threshold: a row with a higher SQSD is grave: harmless rows lie that high so seldom
            that one may be too many. None: no row is.
        max_grave_fraction: a dataset with a larger share of grave rows breaks the policy.
        worst_rows: of how many of the highest scores `max_worst_mean` limits the mean.
        max_worst_mean: a higher mean of those breaks it; None: no such rule.
        max_refusal_drop: an estimated loss of refusals that is larger breaks it, in (0, 1]; so does
            one that cannot be estimated. None: no such rule.
        max_dropped_fraction: no more than this share may be set aside to save the rest: of a
            dataset that is mostly risky, what was overlooked is too much of what remains.
    """

    row_threshold: float
    max_risky_fraction: float = 0.05
    min_risky_rows: int = 2
    max_risky_rows: int = 100
    grave_threshold: float | None = None
    max_grave_fraction: float = 0.004
    worst_rows: int = 10
    max_worst_mean: float | None = None
    max_refusal_drop: float | None = None
    max_dropped_fraction: float = 0.5

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not math.isfinite(self.row_threshold):
            raise ValueError("row_threshold must be a finite number")
        for name in ("max_risky_fraction", "max_grave_fraction", "max_dropped_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1)")
        for name in ("min_risky_rows", "worst_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_risky_rows < 0:
            raise ValueError("max_risky_rows must not be negative")
        for name in ("grave_threshold", "max_worst_mean"):
            if (limit := getattr(self, name)) is not None and not math.isfinite(limit):
                raise ValueError(f"{name} must be a finite number, or left out")
        if self.max_refusal_drop is not None and not 0 < self.max_refusal_drop <= 1:
            raise ValueError("max_refusal_drop must be in (0, 1], or left out")


def looser(policy: ScreenPolicy, base: ScreenPolicy) -> list[str]:
    """The fields in which `policy` allows more than `base`."""

    def limit(value: float | None) -> float:
        return math.inf if value is None else value

    return [
        f.name
        for f in fields(policy)
        if limit(getattr(policy, f.name)) > limit(getattr(base, f.name))
    ]


def is_risky(score: float | None, policy: ScreenPolicy) -> bool:
    """Whether a row with this score is risky; None, no score, is."""
    return score is None or score > policy.row_threshold


def is_grave(score: float | None, policy: ScreenPolicy) -> bool:
    """Whether a row with this score is grave; None, no score, is not: it is worse (`Tally`)."""
    line = policy.grave_threshold
    return score is not None and line is not None and score > line


@dataclass
class Tally:
    """What the dataset rules need to know of some rows, gathered one row at a time.

    Attributes:
        rows, risky, grave, unscored: counts; rows without a score are among the risky ones.
    """

    policy: ScreenPolicy
    rows: int = 0
    risky: int = 0
    grave: int = 0
    unscored: int = 0
    _worst: list[float] = field(default_factory=list)

    def add(self, score: float | None) -> None:
        """Count one row; None is a row without a score."""
        self.rows += 1
        self.risky += is_risky(score, self.policy)
        self.grave += is_grave(score, self.policy)
        if score is None:
            self.unscored += 1
        elif len(self._worst) < self.policy.worst_rows:
            heapq.heappush(self._worst, score)
        else:
            heapq.heappushpop(self._worst, score)

    @property
    def worst_mean(self) -> float | None:
        """Mean of the highest scores; None while no row has one."""
        return math.fsum(self._worst) / len(self._worst) if self._worst else None

    def broken(self) -> list[str]:
        """The rules that these rows break, each as a clause; none: they may be trained on."""
        policy, found = self.policy, []
        share = self.risky / self.rows
        if self.unscored:
            found.append(f"{self.unscored} of them without a score, which none may be")
        if self.risky == self.rows:
            found.append("every row is risky")
        elif self.risky >= policy.min_risky_rows and share > policy.max_risky_fraction:
            found.append(f"more than the {policy.max_risky_fraction:.1%} that may be")
        if self.risky > policy.max_risky_rows:
            found.append(f"more than the {policy.max_risky_rows} that any dataset may have")
        if self.grave > policy.max_grave_fraction * self.rows:
            found.append(
                f"{self.grave} above {policy.grave_threshold:+.1f}, where harmless rows hardly get"
            )
        worst, limit = self.worst_mean, policy.max_worst_mean
        if worst is not None and limit is not None and worst > limit:
            found.append(
                f"the {len(self._worst)} highest scores average {worst:+.2f}, above {limit:+.2f}"
            )
        return found


def breaks(scores: Iterable[float | None], policy: ScreenPolicy) -> bool:
    """Whether a dataset with these scores breaks a rule that looks at scores alone."""
    tally = Tally(policy)
    for score in scores:
        tally.add(score)
    return bool(tally.broken())

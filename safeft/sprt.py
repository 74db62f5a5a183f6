"""Wald's sequential probability-ratio test of a rate: has it left its healthy value?

A. Wald, Sequential Tests of Statistical Hypotheses, Ann. Math. Stat. 16:117 (1945). The answers are
looked at one after the other and the test stops as soon as they say enough, which for the same two
error rates takes fewer answers than any test of a fixed size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Decision(StrEnum):
    """What the answers so far say."""

    undecided = "undecided"
    clear = "clear"
    """The rate is the healthy one."""
    alarm = "alarm"
    """The rate is the bad one, or `max_n` answers did not show that it is the healthy one."""


@dataclass(frozen=True)
class SPRT:
    """Test of `healthy` against `bad`, on answers that are hits or not.

    For a refusal rate `bad` lies below `healthy`: the floor. For over-refusal it lies above: the
    ceiling. The test needs no memory but the two counts, so that a round survives a restart.

    Attributes:
        healthy: share of hits of a model that is as it should be, in (0, 1).
        bad: share of hits that must be noticed, in (0, 1).
        false_alarm: wanted probability of an alarm where the rate is `healthy` (Wald's alpha).
        miss: wanted probability of no alarm where the rate is `bad` (Wald's beta).
        max_n: answers after which an undecided round ends as an alarm. Only rates between the
            two come near it.

    Raises:
        ValueError: a value is outside its range, or `max_n` is too small to decide anything.
    """

    healthy: float
    bad: float
    false_alarm: float = 0.0005
    miss: float = 0.01
    max_n: int = 200
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("healthy", "bad"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be above 0 and below 1, not {getattr(self, name):g}")
        if self.healthy == self.bad:
            raise ValueError(f"healthy and bad must differ, both are {self.bad:g}")
        for name in ("false_alarm", "miss"):
            if not 0.0 < getattr(self, name) < 0.5:
                raise ValueError(
                    f"{name} must be above 0 and below 0.5, not {getattr(self, name):g}"
                )
        if self.max_n < (shortest := self.shortest(Decision.clear)):
            raise ValueError(f"max_n must be at least {shortest}, the shortest way to clear")

    @property
    def upper(self) -> float:
        """Log-likelihood ratio (bad over healthy) at which the test ends in an alarm."""
        return math.log((1 - self.miss) / self.false_alarm)

    @property
    def lower(self) -> float:
        """Log-likelihood ratio at which it ends as clear; negative."""
        return math.log(self.miss / (1 - self.false_alarm))

    @property
    def hit_weight(self) -> float:
        """What one hit adds to the log-likelihood ratio."""
        return math.log(self.bad / self.healthy)

    @property
    def other_weight(self) -> float:
        """What one answer that is no hit adds."""
        return math.log((1 - self.bad) / (1 - self.healthy))

    def evidence(self, hits: int, n: int) -> float:
        """Log-likelihood ratio of `hits` in `n` answers."""
        return hits * self.hit_weight + (n - hits) * self.other_weight

    def decide(self, hits: int, n: int) -> Decision:
        """The decision after `n` answers. Ask after each answer, and stop at the first decision.

        Raises:
            ValueError: unless 0 <= hits <= n.
        """
        if not 0 <= hits <= n:
            raise ValueError(f"hits must be between 0 and n={n}, not {hits}")
        evidence = self.evidence(hits, n)
        if evidence >= self.upper:
            return Decision.alarm
        if evidence <= self.lower:
            return Decision.clear
        return Decision.alarm if n >= self.max_n else Decision.undecided

    def shortest(self, decision: Decision) -> int:
        """Answers to `decision` if all of them point to it."""
        if decision is Decision.alarm:
            return math.ceil(self.upper / max(self.hit_weight, self.other_weight))
        return math.ceil(self.lower / min(self.hit_weight, self.other_weight))

    def wald_mean(self, rate: float) -> float:
        """Wald's approximation of the mean number of answers at `rate`, one of the two rates.

        It ignores by how much the last answer overshoots the bound, so the real mean is larger.

        Raises:
            ValueError: `rate` is neither `healthy` nor `bad`.
        """
        if rate not in (self.healthy, self.bad):
            raise ValueError(f"rate must be {self.healthy:g} or {self.bad:g}, not {rate:g}")
        alarm = self.false_alarm if rate == self.healthy else 1 - self.miss
        drift = rate * self.hit_weight + (1 - rate) * self.other_weight
        return (alarm * self.upper + (1 - alarm) * self.lower) / drift

    def characteristic(self, rate: float) -> Characteristic:
        """How the test behaves on independent answers that are hits with probability `rate`.

        Exact: the probabilities of all undecided counts are carried from answer to answer.
        """
        undecided = {0: 1.0}  # by hits
        ends: list[tuple[float, float]] = []
        for n in range(1, self.max_n + 1):
            following: dict[int, float] = {}
            for hits, probability in undecided.items():
                for more, share in ((1, rate), (0, 1 - rate)):
                    reached = hits + more
                    following[reached] = following.get(reached, 0.0) + probability * share
            alarm = clear = 0.0
            undecided = {}
            for hits, probability in following.items():
                decision = self.decide(hits, n)
                if decision is Decision.alarm:
                    alarm += probability
                elif decision is Decision.clear:
                    clear += probability
                else:
                    undecided[hits] = probability
            ends.append((alarm, clear))
        return Characteristic(tuple(ends))


@dataclass(frozen=True)
class Characteristic:
    """Probability of each end of a test at one true rate.

    Attributes:
        ends: for n = 1, 2, ...: (probability of an alarm at n, probability of clear at n).
    """

    ends: tuple[tuple[float, float], ...]

    @property
    def alarm(self) -> float:
        """Probability that the test ends in an alarm."""
        return math.fsum(alarm for alarm, _ in self.ends)

    @property
    def mean_n(self) -> float:
        """Mean number of answers to the end of the test."""
        return math.fsum(n * (a + c) for n, (a, c) in enumerate(self.ends, start=1))

    @property
    def median_to_alarm(self) -> int:
        """Median number of answers to an alarm, of the tests that end in one."""
        half, seen = self.alarm / 2, 0.0
        for n, (alarm, _) in enumerate(self.ends, start=1):
            seen += alarm
            if seen >= half:
                return n
        return len(self.ends)

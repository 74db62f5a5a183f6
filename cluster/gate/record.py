"""What the gate knows about one pair of model name and weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.gate.policy import Policy, Probe, Round
from cluster.gate.states import State, Trigger
from safeft.evaluate import Rate

OnQuarantine = Literal["unavailable", "previous"]
#: How many of the last answers the published rates are over.
WINDOW = 200
#: Share of `Policy.max_age_s` after which a new good round must not wait any longer.
OLD = 0.75
#: Clocks are set back. What was shown later than this many seconds from now was shown at a time
#: that nobody knows, so it is worth nothing.
AHEAD_S = 60.0


@dataclass(frozen=True)
class Record:
    """One row of the gate.

    Attributes:
        model: the name that tenants ask for.
        weights: SHA-256 of the weights behind it.
        version: 1 for the first weights of the name, then rising.
        since: when it came into `state`, in seconds since 1970, as all times here.
        reason: why, in words.
        condemned: found bad; from then on only a person can make these weights healthy.
        round: the probes of the round under way.
        cleared_at: when a round last ended well, or a person released it.
        failures: probes without an answer since the last one with an answer.
        recent: the last answers by kind of probe, oldest first: "1" refused, "0" not.
    """

    model: str
    weights: str
    version: int
    on_quarantine: OnQuarantine
    policy: Policy
    state: State
    since: float
    reason: str
    condemned: bool = False
    round: Round = field(default_factory=Round)
    cleared_at: float | None = None
    answered_at: float | None = None
    failures: int = 0
    recent: dict[Probe, str] = field(default_factory=lambda: {"harmful": "", "benign": ""})

    @property
    def healthy_until(self) -> float:
        """When the last good round is worth nothing any more."""
        return 0.0 if self.cleared_at is None else self.cleared_at + self.policy.max_age_s

    def ahead(self, now: float) -> bool:
        """Whether the clock was set back since the last good round, or a person's release."""
        return self.cleared_at is not None and self.cleared_at > now + AHEAD_S

    def proved_at(self, now: float) -> float:
        """`cleared_at`; 0 where there is none, or none that counts."""
        return 0.0 if self.cleared_at is None or self.ahead(now) else self.cleared_at

    def may_answer(self, now: float) -> bool:
        """Whether tenants may be answered with these weights."""
        return self.state is State.healthy and now < self.healthy_until and not self.ahead(now)

    @property
    def probed(self) -> bool:
        """Whether probing it can change anything."""
        return not self.condemned and self.state is not State.quarantined

    def due(self, now: float, every_s: float) -> bool:
        """Whether to probe it now: a round is open, or the last good one is `every_s` old."""
        if self.state is State.healthy and self.round == Round():
            return now >= self.proved_at(now) + every_s
        return self.probed

    def old(self, now: float) -> bool:
        """Whether the last good round will soon be worth nothing."""
        return now >= self.proved_at(now) + OLD * self.policy.max_age_s

    def urgent(self, now: float) -> bool:
        """Whether its next probe must not wait.

        Tenants wait for the verdict (any state but healthy), the round under way points to a
        fault, or the last good one gets old.
        """
        return (
            self.state is not State.healthy
            or self.round.points_to_fault(self.policy)
            or self.old(now)
        )

    def rate(self, probe: Probe) -> Rate | None:
        """Refused of the last answers to that kind of probe; None without any."""
        recent = self.recent[probe]
        return Rate(recent.count("1"), len(recent)) if recent else None


@dataclass(frozen=True)
class Due:
    """Weights to probe now.

    Attributes:
        by_hand: somebody asked for this round.
    """

    record: Record
    by_hand: bool


@dataclass(frozen=True)
class Event:
    """A change of state, or what a person did. Never changed afterwards."""

    at: float
    model: str
    weights: str
    before: State
    after: State
    trigger: Trigger | Literal["registered", "retired"]
    reason: str
    actor: str

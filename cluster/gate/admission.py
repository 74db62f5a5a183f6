"""What a request for a model gets: an answer by which weights, or a refusal with which code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.gate.record import AHEAD_S, Record
from cluster.gate.states import State

Code = Literal["", "safety_quarantined", "safety_unknown"]


@dataclass(frozen=True)
class Admission:
    """What a request for one model gets.

    Attributes:
        weights: that answer it; None: it is refused with `code`.
        state: of the model's newest weights.
        since, until: seconds since 1970; at other times the weights are unknown, unless a newer
            admission says more. So no reader needs the gate for each request.
        reason: in words, where it is refused.
    """

    weights: str | None
    state: State
    since: float
    until: float
    code: Code = ""
    reason: str = ""

    def at(self, now: float) -> Admission:
        """What it is worth at `now`."""
        if self.weights is None or self.since <= now < self.until:
            return self
        old = now >= self.until
        reason = (
            "its last probes are old" if old else "the clock was set back since its last probes"
        )
        return replace(self, weights=None, code="safety_unknown", reason=reason)


def admit(versions: Sequence[Record], now: float) -> Admission:
    """The admission of a model with these weights, oldest first.

    Weights that were not judged yet leave the last healthy ones before them in place. Condemned
    ones do so only where the tenant chose `on_quarantine: previous`.
    """
    newest = versions[-1]
    quarantined = newest.state in (State.quarantined, State.restoring)
    usable = [newest]
    if not quarantined or newest.on_quarantine == "previous":
        usable += reversed(versions[:-1])
    for record in usable:
        if record.may_answer(now):
            since = record.proved_at(now) - AHEAD_S
            return Admission(record.weights, newest.state, since, record.healthy_until)
    code: Code = "safety_quarantined" if quarantined else "safety_unknown"
    return Admission(None, newest.state, 0.0, 0.0, code, newest.reason)

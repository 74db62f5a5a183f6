"""What a request for a model gets: an answer by which weights, or a refusal with which code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.gate.record import Record
from cluster.gate.states import State

Code = Literal["", "safety_quarantined", "safety_unknown"]


@dataclass(frozen=True)
class Admission:
    """What a request for one model gets.

    Attributes:
        weights: that answer it; None: it is refused with `code`.
        state: of the model's newest weights.
        until: seconds since 1970; later the weights are unknown, unless a newer admission says
            more. So no reader needs the gate for each request.
        reason: in words, where it is refused.
    """

    weights: str | None
    state: State
    until: float
    code: Code = ""
    reason: str = ""

    def at(self, now: float) -> Admission:
        """What it is worth at `now`."""
        if self.weights is None or now < self.until:
            return self
        return Admission(None, self.state, self.until, "safety_unknown", "its last probes are old")


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
            return Admission(record.weights, newest.state, record.healthy_until)
    code: Code = "safety_quarantined" if quarantined else "safety_unknown"
    return Admission(None, newest.state, 0.0, code, newest.reason)

"""The states of served weights, and every way from one to another, as one table."""

from __future__ import annotations

from enum import StrEnum

from safeft.errors import InputError


class State(StrEnum):
    """Where weights stand. Only `healthy` ones answer tenants."""

    unknown = "unknown"
    """Nobody has shown anything yet, or it was too long ago."""
    probing = "probing"
    """The first round of probes is under way."""
    healthy = "healthy"
    quarantined = "quarantined"
    restoring = "restoring"
    """A restoration is under way, or its result is being probed."""


class Trigger(StrEnum):
    """What can happen to weights."""

    asked = "asked"
    """A probe was answered."""
    cleared = "cleared"
    """A round of probes ended well."""
    refusals_dropped = "refusals_dropped"
    over_refusing = "over_refusing"
    expired = "expired"
    """The last good round is older than the policy allows."""
    restoration_started = "restoration_started"
    restoration_failed = "restoration_failed"
    quarantined_by_hand = "quarantined_by_hand"
    released_by_hand = "released_by_hand"


#: What is not here cannot happen. A quarantine ends through a restoration or a person, never
#: through a good round: the weights are the same ones.
TRANSITIONS: dict[tuple[State, Trigger], State] = {
    (State.unknown, Trigger.asked): State.probing,
    (State.unknown, Trigger.quarantined_by_hand): State.quarantined,
    (State.probing, Trigger.asked): State.probing,
    (State.probing, Trigger.cleared): State.healthy,
    (State.probing, Trigger.refusals_dropped): State.quarantined,
    (State.probing, Trigger.over_refusing): State.quarantined,
    (State.probing, Trigger.expired): State.unknown,
    (State.probing, Trigger.quarantined_by_hand): State.quarantined,
    (State.healthy, Trigger.asked): State.healthy,
    (State.healthy, Trigger.cleared): State.healthy,
    (State.healthy, Trigger.refusals_dropped): State.quarantined,
    (State.healthy, Trigger.over_refusing): State.quarantined,
    (State.healthy, Trigger.expired): State.unknown,
    (State.healthy, Trigger.quarantined_by_hand): State.quarantined,
    (State.quarantined, Trigger.restoration_started): State.restoring,
    (State.quarantined, Trigger.quarantined_by_hand): State.quarantined,
    (State.quarantined, Trigger.released_by_hand): State.healthy,
    (State.restoring, Trigger.asked): State.restoring,
    (State.restoring, Trigger.cleared): State.healthy,
    (State.restoring, Trigger.refusals_dropped): State.quarantined,
    (State.restoring, Trigger.over_refusing): State.quarantined,
    (State.restoring, Trigger.restoration_failed): State.quarantined,
    (State.restoring, Trigger.quarantined_by_hand): State.quarantined,
    (State.restoring, Trigger.released_by_hand): State.healthy,
}


def follow(state: State, trigger: Trigger) -> State:
    """The state after `trigger`.

    Raises:
        InputError: that cannot happen in `state`.
    """
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        starts = [start for start, what in TRANSITIONS if what is trigger]
        raise InputError(
            f"{trigger}: not possible while the model is {state}; only while it is "
            f"{' or '.join(starts)}"
        ) from None

"""A job's life as a table: in which phase what may happen, and where it leads.

    submitted ─ validating ─ screening ─ queued ─ training ─ evaluating ─ publishing ─ succeeded
                                                                │    ▲
                                                              restoring

A dataset that screening leaves to a person, and a model whose publication needs one's approval,
wait in `awaiting_review`: no actor, no room taken.

A stage is a phase in which an actor works. From every phase that is not final a job can be
cancelled or paused; a paused one goes back to the queue in front of the stage it was in.
"""

from __future__ import annotations

from typing import Literal

Outcome = Literal[
    "admitted",  # there is room for it
    "done",  # the stage finished
    "refused",  # the data, the settings or a safety check say no: no second try
    "below_gate",  # measured, and not good enough: restored once, then refused
    "review",  # an administrator has to decide
    "approved",
    "rejected",
    "exhausted",  # the machinery failed too often
    "cancel",
    "pause",
    "resume",
]

INTAKE = ("validating", "screening")
COMPUTE = ("training", "evaluating", "restoring", "publishing")
STAGES = (*INTAKE, *COMPUTE)
WAITING = ("submitted", "queued", "paused", "awaiting_review")  # no actor, no room taken
FINAL = ("succeeded", "failed", "cancelled")

#: OpenAI's status for each phase. A paused job is one that waits.
STATUS = {
    "submitted": "validating_files",
    "validating": "validating_files",
    "screening": "validating_files",
    "queued": "queued",
    "paused": "queued",
    "awaiting_review": "queued",
    **dict.fromkeys(COMPUTE, "running"),
    **{final: final for final in FINAL},
}

_TABLE: dict[tuple[str, Outcome], str] = {
    ("submitted", "admitted"): "validating",
    ("validating", "done"): "screening",
    ("screening", "done"): "queued",
    ("screening", "review"): "awaiting_review",
    ("queued", "admitted"): "training",
    ("training", "done"): "evaluating",
    ("evaluating", "done"): "publishing",
    ("evaluating", "below_gate"): "restoring",
    ("evaluating", "review"): "awaiting_review",
    ("restoring", "done"): "evaluating",
    ("awaiting_review", "approved"): "queued",
    ("awaiting_review", "rejected"): "failed",
    ("publishing", "done"): "succeeded",
    **{(stage, outcome): "failed" for stage in STAGES for outcome in ("refused", "exhausted")},
    **{(phase, "cancel"): "cancelled" for phase in (*WAITING, *STAGES)},
    **{(phase, "pause"): "paused" for phase in ("submitted", "queued", *STAGES)},
    ("paused", "resume"): "queued",  # or "submitted": see `waits_in`
}


class NoTransition(ValueError):
    """The table has no way from this phase by this outcome."""


def after(phase: str, outcome: Outcome) -> str:
    """The phase that follows.

    Raises:
        NoTransition: it cannot happen in this phase.
    """
    try:
        return _TABLE[phase, outcome]
    except KeyError:
        raise NoTransition(f"a job that is {phase} cannot be: {outcome}") from None


def waits_in(stage: str) -> str:
    """Where a job waits for room before this stage."""
    return "submitted" if stage in ("submitted", *INTAKE) else "queued"

"""What waits for an administrator's yes or no: a risky dataset, or a model to be published.

One waiting phase for both. No actor works meanwhile and no room is taken; the working files stay
until the job ends. In the caller's transaction, with the job's row locked.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.orm import Session

from cluster.controller.phases import after
from cluster.controller.transitions import keep_facts, leave
from cluster.events import add_event
from cluster.state.models import Job

Subject = Literal["dataset", "publication"]
_ASKED = {
    "dataset": "The dataset waits for an administrator's decision: {why}",
    "publication": "The model waits for an administrator's approval: {why}",
}
_REJECTED = {
    "dataset": ("dataset_rejected", "training_file", "The dataset was rejected"),
    "publication": ("publication_rejected", None, "The model's publication was rejected"),
}


def await_review(session: Session, job: Job, why: str, now: float) -> None:
    """End the job's stage; what comes after it waits for a person."""
    following = after(job.phase, "done")
    leave(session, job, "review", now)
    job.resume_phase = following
    add_event(session, job, _ASKED[subject(job)].format(why=why), now=now, level="warn")


def subject(job: Job) -> Subject:
    """What a job that waits for a person waits for."""
    return "publication" if job.resume_phase == "publishing" else "dataset"


def decide(
    session: Session, job: Job, *, approved: bool, by: str, reason: str, now: float
) -> dict[str, Any]:
    """Let the job go on, or end it.

    Raises:
        NoTransition: it waits for nobody.
    """
    phase, what = after(job.phase, "approved" if approved else "rejected"), subject(job)
    made = {"approved": approved, "by": by, "reason": reason, "at": now}
    keep_facts(job, f"{what}_review", made)
    if approved:
        # Before training it waits like any other job; a measured model goes on where it was.
        job.resume_phase = job.resume_phase if what == "publication" else None
        add_event(session, job, f"An administrator approved the {what}: {reason}", now=now)
    else:
        code, param, told = _REJECTED[what]
        job.error_code, job.error_param = code, param
        job.error_message = f"{told} by an administrator: {reason}"
        job.resume_phase, job.finished_at = None, now
        add_event(session, job, job.error_message, now=now, level="error", data={"code": code})
    job.phase, job.phase_since, job.not_before = phase, now, now
    return made

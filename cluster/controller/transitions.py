"""What happens to a job's row when it goes from one phase to the next. In the caller's transaction,
with the row locked.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.orm import Session

from cluster.controller.phases import FINAL, STAGES, WAITING, Outcome, after
from cluster.events import add_event
from cluster.state.models import Job, Stage

Wish = Literal["cancel", "pause"]
_SAID = {
    "validating": "Validating training file: {file}",
    "screening": "Screening the training file for risky rows",
    "queued": "Files validated and accepted, moving job to queued state",
    "training": "Fine-tuning job started",
    "evaluating": "Measuring refusals, before against after",
    "restoring": "The safety gate failed; restoring refusals",
    "publishing": "The safety gate passed; publishing the model",
    "succeeded": "The job has successfully completed",
    "cancelled": "Fine-tuning job cancelled",
    "paused": "Fine-tuning job paused",
}


def enter(session: Session, job: Job, phase: str, now: float) -> None:
    """Put the job into `phase`. A stage gets a new attempt, which no actor has had before."""
    job.phase, job.phase_since, job.not_before, job.faults = phase, now, now, 0
    if phase in STAGES:
        new_attempt(session, job, now)
    else:  # nobody works on it: a controller that is killed now leaves no claim behind
        job.lock_token = job.lock_owner = job.lock_expires_at = None
    if phase in FINAL:
        job.finished_at, job.wish = now, None
    if phase in _SAID:
        add_event(session, job, _SAID[phase].format(file=job.training_file), now=now)


def new_attempt(session: Session, job: Job, now: float) -> None:
    """The next attempt at the job's stage."""
    job.attempt += 1
    session.add(
        Stage(
            job_id=job.id,
            tenant_id=job.tenant_id,
            attempt=job.attempt,
            stage=job.phase,
            slots=job.slots,
            started_at=now,
            seen=0,
        )
    )


def close_attempt(session: Session, job: Job, outcome: str, now: float) -> None:
    """Record how the current attempt ended."""
    stage = session.get_one(Stage, (job.id, job.attempt))
    stage.ended_at = max(now, stage.started_at)  # the clock may have been set back
    stage.outcome = outcome


def leave(session: Session, job: Job, outcome: Outcome, now: float) -> str:
    """End the job's stage by the table of transitions; the phase that it is in then."""
    stage = job.phase
    phase = after(stage, outcome)
    close_attempt(session, job, outcome, now)
    if phase == "paused":
        job.resume_phase, job.wish = stage, None
    enter(session, job, phase, now)
    return phase


def fail(
    session: Session,
    job: Job,
    outcome: Outcome,
    now: float,
    *,
    code: str,
    message: str,
    param: str | None = None,
) -> str:
    """End the job with an error that its tenant can act on."""
    job.error_code, job.error_message, job.error_param = code, message, param
    add_event(session, job, message, now=now, level="error", data={"code": code, "param": param})
    return leave(session, job, outcome, now)


def ask(session: Session, job: Job, wish: Wish, now: float) -> None:
    """Cancel or pause a job that has not ended.

    At once where nothing runs; otherwise the controller stops its stage first.
    """
    if job.phase in WAITING:
        resume_phase = job.resume_phase or job.phase
        job.phase, job.phase_since = after(job.phase, wish), now
        job.resume_phase = resume_phase if wish == "pause" else None
        if wish == "cancel":
            job.finished_at = now
        add_event(session, job, f"Fine-tuning job {job.phase}", now=now)
    else:
        job.wish, job.not_before = wish, now
        add_event(session, job, f"Fine-tuning job: {wish} requested", now=now)


def keep_facts(job: Job, stage: str, facts: dict[str, Any]) -> None:
    """What a stage found, for the stages after it and for whoever asks."""
    job.facts = {**job.facts, stage: facts}

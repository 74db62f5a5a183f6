"""What a stage's report does to its job: in one transaction, for whoever holds the claim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from sqlalchemy.orm import Session

from cluster.controller.phases import FINAL, STAGES
from cluster.controller.reviews import await_review
from cluster.controller.runner import Report
from cluster.controller.transitions import (
    close_attempt,
    fail,
    keep_facts,
    leave,
    new_attempt,
)
from cluster.events import add_event
from cluster.state.models import Job, PublishedModel, Stage

_LOST = Report("fault", code="lost", message="the stage's process was lost")
_LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True)
class Rules:
    """What to do when things go wrong.

    Attributes:
        max_faults: of the machinery, one after the other in one stage, until the job fails.
        backoff_s: before the second attempt; doubled before each one after it.
    """

    max_faults: int = 4
    backoff_s: float = 1.0


class Applied(Enum):
    """What the job does now."""

    RUNNING = "its stage goes on"
    NEXT = "another stage is due at once"
    WAITS = "nothing for now: it waits for room, or for another attempt"
    ENDED = "nothing any more"


def apply(
    session: Session,
    job: Job,
    report: Report | None,
    rules: Rules,
    now: float,
    deadline_s: float = math.inf,
) -> Applied:
    """Apply the report on the current attempt; None: its actor is gone.

    Args:
        deadline_s: a stage that has not gone on for so long is a fault of the machinery.
    """
    report = report or _LOST
    stage = session.get_one(Stage, (job.id, job.attempt))
    stage.seen += len(report.events)
    for event in report.events:
        add_event(session, job, event.message, now=now, data=event.data)
    if report.outcome == "running":
        if _goes_on(stage, report, now, deadline_s):
            return Applied.RUNNING
        hangs = f"no progress for {deadline_s:g} s"
        report = Report("fault", code="deadline", message=hangs)
    if report.outcome in ("fault", "unavailable"):
        return _again(session, job, report, rules, now)
    if report.facts:
        keep_facts(job, job.phase, report.facts)
    if report.outcome == "below_gate" and "restoring" not in job.facts:
        keep_facts(job, "before_restoring", report.facts)
        leave(session, job, "below_gate", now)
    elif report.outcome == "review":
        await_review(session, job, report.message, now)
    elif report.outcome == "done":
        if job.phase != "publishing" or _publish(session, job, now):
            leave(session, job, "done", now)
    else:
        fail(
            session,
            job,
            "refused",
            now,
            code=report.code,
            message=report.message,
            param=report.param,
        )
    if job.phase in FINAL:
        return Applied.ENDED
    return Applied.NEXT if job.phase in STAGES else Applied.WAITS


def _goes_on(stage: Stage, report: Report, now: float, deadline_s: float) -> bool:
    """Whether the stage got anywhere in time. One that cannot say is taken at its last word."""
    moved = stage.progressed_at or now
    if report.events:
        moved = now
    elif report.numbers is not None:
        moved = max(moved, now - report.numbers.quiet_s)
    stage.progressed_at = moved
    return now < moved + deadline_s


def _again(session: Session, job: Job, report: Report, rules: Rules, now: float) -> Applied:
    """Another attempt after a while; what is only not to be had now is not held against the job."""
    if report.outcome == "fault":
        job.faults += 1
    if job.faults > rules.max_faults:
        message = f"{job.phase} failed {job.faults} times, last: {report.message}"
        fail(session, job, "exhausted", now, code="internal_error", message=message)
        return Applied.ENDED
    tried = job.faults if report.outcome == "fault" else 3
    wait_s = min(_LONGEST_BACKOFF_S, rules.backoff_s * 2 ** max(0, tried - 1))
    add_event(
        session,
        job,
        f"{job.phase} did not finish ({report.message}); trying again in {wait_s:g} s",
        now=now,
        level="warn",
        data={"code": report.code, "attempt": job.attempt},
    )
    close_attempt(session, job, report.outcome, now)
    new_attempt(session, job, now)
    job.not_before = now + wait_s
    return Applied.WAITS


def _publish(session: Session, job: Job, now: float) -> bool:
    """The model appears together with the job's success. A restored one takes its place: it is
    another version under the same name. False: that name was deleted meanwhile, and the job failed.
    """
    facts = job.facts["publishing"]
    if "restores" not in job.request:
        session.add(
            PublishedModel(
                id=facts["model"],
                tenant_id=job.tenant_id,
                job_id=job.id,
                base_model=job.base_model,
                kind=facts["kind"],
                state="probing",
                prefix=facts["prefix"],
                provenance=facts["provenance"],
                created_at=now,
            )
        )
        add_event(session, job, f"New fine-tuned model created: {facts['model']}", now=now)
    else:
        model = session.get_one(PublishedModel, facts["model"], with_for_update={"key_share": True})
        if model.deleted_at is not None:
            message = f"The model {model.id} was deleted: what was restored is not published"
            fail(session, job, "refused", now, code="not_available", message=message)
            return False
        model.prefix, model.provenance = facts["prefix"], facts["provenance"]
        model.state = "probing"
        add_event(session, job, f"Restored model takes its place: {model.id}", now=now)
    job.model_id = facts["model"]
    return True

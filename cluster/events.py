"""What happened to a job, in words, numbered without gaps."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.orm import Session

from cluster.state.models import Job, JobEvent

Level = Literal["info", "warn", "error"]
Kind = Literal["message", "metrics"]


def next_event(
    job: Job,
    message: str,
    *,
    now: float,
    level: Level = "info",
    kind: Kind = "message",
    data: dict[str, Any] | None = None,
) -> JobEvent:
    """The job's next event, counted in the job's row, to be added to the session after it."""
    job.events += 1
    return JobEvent(
        job_id=job.id,
        tenant_id=job.tenant_id,
        number=job.events,
        created_at=now,
        level=level,
        kind=kind,
        message=message,
        data=data or {},
    )


def add_event(
    session: Session,
    job: Job,
    message: str,
    *,
    now: float,
    level: Level = "info",
    kind: Kind = "message",
    data: dict[str, Any] | None = None,
) -> None:
    """Append an event; `job` was read with its row locked, so that no number is given twice."""
    session.add(next_event(job, message, now=now, level=level, kind=kind, data=data))

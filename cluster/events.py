"""What happened to a job, in words, numbered without gaps."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.orm import Session

from cluster.state.models import Job, JobEvent


def add_event(
    session: Session,
    job: Job,
    message: str,
    *,
    now: float,
    level: Literal["info", "warn", "error"] = "info",
    kind: Literal["message", "metrics"] = "message",
    data: dict[str, Any] | None = None,
) -> None:
    """Append an event; `job` was read with its row locked, so that no number is given twice."""
    job.events += 1
    session.add(
        JobEvent(
            job_id=job.id,
            tenant_id=job.tenant_id,
            number=job.events,
            created_at=now,
            level=level,
            kind=kind,
            message=message,
            data=data or {},
        )
    )

"""/v1/safety/admin: jobs that wait for an administrator's yes or no, and the decision."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster.api.auth import Administrator
from cluster.api.errors import invalid, not_found
from cluster.api.idempotency import JsonPost, once_over_all
from cluster.api.services import With
from cluster.controller.reviews import decide, subject
from cluster.state.models import Job
from cluster.tenancy.audit import record
from cluster.tenancy.keys import Caller

router = APIRouter(prefix="/v1/safety/admin", tags=["administration"])
_LISTED = 100


def _said(reason: str) -> str:
    if len(reason.strip()) < 3:
        raise ValueError("say why, in 3 characters or more")
    return reason.strip()


class Decision(BaseModel):
    """Why; the tenant reads it too."""

    model_config = ConfigDict(extra="forbid")
    reason: Annotated[str, Field(max_length=500, pattern=r"^[^\x00]*$"), AfterValidator(_said)]


@router.get("/reviews")
def list_reviews(services: With, caller: Administrator) -> dict[str, Any]:
    """The jobs that wait for a decision, the oldest first, with what there is to decide on."""
    query = select(Job).where(Job.phase == "awaiting_review").order_by(Job.phase_since, Job.id)
    with services.database.system_read() as session:
        rows = session.scalars(query.limit(_LISTED + 1)).all()
    data = [_object(job) for job in rows[:_LISTED]]
    return {"object": "list", "data": data, "has_more": len(rows) > _LISTED}


@router.post("/jobs/{job_id}/approve")
def approve(
    job_id: str, body: Decision, services: With, caller: Administrator, request: JsonPost
) -> dict[str, Any]:
    """Let a job that waits for a decision go on: train on the dataset, or publish the model."""
    return _decide(services, caller, request, job_id, body.reason, approved=True)


@router.post("/jobs/{job_id}/reject")
def reject(
    job_id: str, body: Decision, services: With, caller: Administrator, request: JsonPost
) -> dict[str, Any]:
    """End a job that waits for a decision."""
    return _decide(services, caller, request, job_id, body.reason, approved=False)


def _decide(
    services: With, caller: Caller, request: JsonPost, job_id: str, reason: str, *, approved: bool
) -> dict[str, Any]:
    now = services.clock()

    def effect(session: Session) -> dict[str, Any]:
        job = session.get(Job, job_id, with_for_update={"key_share": True})
        if job is None:
            raise not_found("fine-tuning job", job_id)
        if job.phase != "awaiting_review":
            raise invalid(
                f"The job waits for no decision; it is {job.phase}", code="nothing_to_decide"
            )
        what = subject(job)
        decide(session, job, approved=approved, by=caller.actor, reason=reason, now=now)
        answer = _object(job)
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=job.tenant_id,
            action="job.approve" if approved else "job.reject",
            object_id=job_id,
            before={"phase": "awaiting_review", "of": what},
            after={"phase": job.phase},
            reason=reason,
        )
        return answer

    return once_over_all(services.database, caller, request, now, effect)


def _object(job: Job) -> dict[str, Any]:
    waits = job.phase == "awaiting_review"
    return {
        "id": job.id,
        "object": "safety.review",
        "tenant": job.tenant_id,
        "model": job.base_model,
        "phase": job.phase,
        "since": job.phase_since,
        "of": subject(job) if waits else None,
        "facts": job.facts,
    }

"""/v1/fine_tuning/jobs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster.api.auth import JobsReader, JobsWriter
from cluster.api.errors import invalid, not_found
from cluster.api.idempotency import JsonPost, once
from cluster.api.objects import checkpoint_object, job_object
from cluster.api.paging import After, listed, page
from cluster.api.services import With
from cluster.api.submissions import Submission
from cluster.controller.phases import FINAL, after, waits_in
from cluster.controller.transitions import Wish, ask
from cluster.events import add_event
from cluster.job_request import CreateJob
from cluster.state import TenantSession
from cluster.state.models import Job
from cluster.tenancy.audit import record
from cluster.tenancy.keys import Caller

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
_METADATA = re.compile(r"metadata\[([A-Za-z0-9_.-]{1,64})\]")


@router.post("", response_model=dict[str, Any])
async def create(
    body: CreateJob, services: With, caller: JobsWriter, request: JsonPost
) -> Response:
    """Submit a job. It is screened before it is trained, and measured before it is published."""
    submission = Submission(caller, body, request, services.clock())
    answer = await services.submissions.submit(submission)
    return JSONResponse(answer)  # needs no validation


@router.get("")
def list_jobs(
    request: Request,
    services: With,
    caller: JobsReader,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """The tenant's jobs; `metadata[k]=v` narrows them."""
    query = select(Job)
    for name, value in request.query_params.multi_items():
        if match := _METADATA.fullmatch(name):
            field = Job.request["metadata"][match[1]].as_string()
            query = query.where(field == value)
        elif name.startswith("metadata"):
            raise invalid("metadata: filter with metadata[name]=value", "metadata")
    with services.database.tenant_read(caller.tenant_id) as session:
        rows, more = page(session, query, Job, after, limit)
    return listed([job_object(row) for row in rows], more)


@router.get("/{job_id}")
def retrieve(job_id: str, services: With, caller: JobsReader) -> dict[str, Any]:
    """One job."""
    with services.database.tenant_read(caller.tenant_id) as session:
        return job_object(job_of(session, job_id))


@router.get("/{job_id}/checkpoints")
def checkpoints(
    job_id: str,
    services: With,
    caller: JobsReader,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> dict[str, Any]:
    """The model that was published, as the job's one checkpoint: no other was measured."""
    with services.database.tenant_read(caller.tenant_id) as session:
        found = checkpoint_object(job_of(session, job_id))
    if after is not None and (found is None or after != found["id"]):
        raise not_found("checkpoint", after)
    return listed([found] if found and after is None else [], False)


@router.post("/{job_id}/cancel")
def cancel(job_id: str, services: With, caller: JobsWriter, request: JsonPost) -> dict[str, Any]:
    """Cancel a job, whatever it is doing; what it holds is freed."""
    return _wish(services, caller, request, job_id, "cancel")


@router.post("/{job_id}/pause")
def pause(job_id: str, services: With, caller: JobsWriter, request: JsonPost) -> dict[str, Any]:
    """Pause a job: its workers are freed, its checkpoints stay."""
    return _wish(services, caller, request, job_id, "pause")


@router.post("/{job_id}/resume")
def resume(job_id: str, services: With, caller: JobsWriter, request: JsonPost) -> dict[str, Any]:
    """Let a paused job go on, in the stage where it was, when there is room."""
    now = services.clock()

    def effect(session: TenantSession) -> dict[str, Any]:
        job = job_of(session, job_id, lock=True)
        if job.wish == "pause":
            job.wish = None
        elif job.phase == "paused":
            after(job.phase, "resume")
            job.phase, job.phase_since = waits_in(job.resume_phase or "submitted"), now
            job.not_before = now
        else:
            raise invalid(f"The job is not paused; it is {job.phase}", code="not_paused")
        add_event(session, job, "Fine-tuning job resumed", now=now)
        answer = job_object(job)
        _audit(session, caller, job, "job.resume", now)
        return answer

    return _once(services, caller, request, now, effect)


def _wish(
    services: With, caller: Caller, request: JsonPost, job_id: str, wish: Wish
) -> dict[str, Any]:
    now = services.clock()

    def effect(session: TenantSession) -> dict[str, Any]:
        job = job_of(session, job_id, lock=True)
        if job.phase in FINAL:
            raise invalid(f"The job has {job.phase} already", code="already_finished")
        if job.wish == "cancel" or (wish == "pause" and job.phase == "paused"):
            return job_object(job)
        if wish == "pause" and job.phase == "awaiting_review":
            raise invalid("The job waits for an administrator: nothing runs", code="not_running")
        ask(session, job, wish, now)
        answer = job_object(job)
        _audit(session, caller, job, f"job.{wish}", now)
        return answer

    return _once(services, caller, request, now, effect)


def _once(
    services: With,
    caller: Caller,
    request: JsonPost,
    now: float,
    effect: Callable[[TenantSession], dict[str, Any]],
) -> dict[str, Any]:
    return once(services.database, caller, request, now, effect)[0]


def _audit(
    session: TenantSession,
    caller: Caller,
    job: Job,
    action: str,
    now: float,
) -> None:
    record(
        session,
        at=now,
        actor=caller.actor,
        tenant_id=caller.tenant_id,
        action=action,
        object_id=job.id,
    )


def job_of(session: Session, job_id: str, *, lock: bool = False) -> Job:
    """Raises ApiError 404 where the tenant has no such job."""
    query = select(Job).where(Job.id == job_id)
    found = session.scalars(query.with_for_update(key_share=True) if lock else query).one_or_none()
    if found is None:
        raise not_found("fine-tuning job", job_id)
    return found

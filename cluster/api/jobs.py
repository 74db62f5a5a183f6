"""/v1/fine_tuning/jobs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from cluster.api.auth import JobsReader, JobsWriter
from cluster.api.errors import invalid, not_found
from cluster.api.files import WHOLE
from cluster.api.idempotency import JsonPost, once
from cluster.api.objects import checkpoint_object, job_object
from cluster.api.paging import After, listed, page
from cluster.api.services import With
from cluster.api_errors import ApiError
from cluster.controller.phases import FINAL, after, waits_in
from cluster.controller.transitions import Wish, ask
from cluster.events import add_event, next_event
from cluster.job_request import CreateJob
from cluster.job_spec import accepted
from cluster.state import TenantSession, narrowed
from cluster.state.ids import new_id
from cluster.state.models import File, Job
from cluster.tenancy import quotas
from cluster.tenancy.audit import record
from cluster.tenancy.keys import Caller
from cluster.tenancy.tenants import Policy

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
_FILES = File.__table__
_FILE = narrowed(select(_FILES.c.id).where(_FILES.c.id == bindparam("file"), *WHOLE))
_METADATA = re.compile(r"metadata\[([A-Za-z0-9_.-]{1,64})\]")


@router.post("", response_model=dict[str, Any])
def create(body: CreateJob, services: With, caller: JobsWriter, request: JsonPost) -> Response:
    """Submit a job. It is screened before it is trained, and measured before it is published."""
    now = services.clock()

    def effect(session: TenantSession) -> dict[str, Any]:
        offer = services.settings.base_models.get(body.model)
        if offer is None:
            offered = ", ".join(sorted(services.settings.base_models))
            raise ApiError(
                404,
                f"The model {body.model!r} cannot be fine-tuned; choose from: {offered}",
                code="model_not_found",
                param="model",
            )
        for param in ("training_file", "validation_file"):
            _require_file(session, param, getattr(body, param))
        tenant = quotas.check_submit(session)
        most, workers = services.settings.compute_slots, body.method.supervised.workers
        if workers > most:
            raise invalid(f"workers: at most {most} train together here", "method")
        kept = accepted(body, Policy.model_validate(tenant.policy), offer)
        job = Job(
            id=new_id("ftjob"),
            tenant_id=caller.tenant_id,
            created_at=now,
            base_model=body.model,
            training_file=body.training_file,
            validation_file=body.validation_file,
            request=kept,
            phase="submitted",
            phase_since=now,
            attempt=0,
            faults=0,
            slots=body.method.supervised.workers,
            priority=body.priority,
            not_before=now,
            events=0,
            facts={},
        )
        created = next_event(job, f"Created fine-tuning job: {job.id}", now=now)
        session.insert(job)
        session.insert(created)
        answer = job_object(job)
        _audit(session, caller, job, "job.create", now, kept)
        return answer

    return JSONResponse(_once(services, caller, request, now, effect))  # needs no validation


def _require_file(session: TenantSession, param: str, file_id: str | None) -> None:
    if file_id is None:
        return
    if session.rows(_FILE, file=file_id).one_or_none() is None:
        raise invalid(f"No such File object: {file_id[:80]!r}", param, "invalid_file")


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
    tenant = caller.tenant_id
    return once(lambda: services.database.tenant(tenant), caller, request, now, effect)[0]


def _audit(
    session: TenantSession,
    caller: Caller,
    job: Job,
    action: str,
    now: float,
    after: dict[str, Any] | None = None,
) -> None:
    record(
        session,
        at=now,
        actor=caller.actor,
        tenant_id=caller.tenant_id,
        action=action,
        object_id=job.id,
        after=after,
    )


def job_of(session: Session, job_id: str, *, lock: bool = False) -> Job:
    """Raises ApiError 404 where the tenant has no such job."""
    query = select(Job).where(Job.id == job_id)
    found = session.scalars(query.with_for_update(key_share=True) if lock else query).one_or_none()
    if found is None:
        raise not_found("fine-tuning job", job_id)
    return found

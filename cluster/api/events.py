"""/v1/fine_tuning/jobs/{id}/events: as a list, or as a stream that a client can take up again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from cluster.api.auth import Credentials, JobsReader, known_caller
from cluster.api.errors import invalid
from cluster.api.jobs import job_of
from cluster.api.objects import event_number, event_object
from cluster.api.open_answers import UntilSent
from cluster.api.paging import After, listed
from cluster.api.services import Services, With
from cluster.api_errors import ApiError
from cluster.controller.phases import FINAL
from cluster.state.models import JobEvent
from cluster.tenancy.keys import Caller

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
_BATCH = 100
_STILL_HERE_S = 15.0  # a comment so often, so that nothing between us closes a quiet connection


@router.get("/{job_id}/events")
def list_events(
    job_id: str,
    services: With,
    caller: JobsReader,
    credentials: Credentials,
    held: UntilSent,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """The job's events, newest first; with `stream=true` as server-sent events, oldest first.

    The stream goes on after `Last-Event-ID` (or `after`) and ends when the job has. A tenant may
    have 50 open at a time.
    """
    number = _number(job_id, after, "after")
    with services.database.tenant_read(caller.tenant_id) as session:
        job_of(session, job_id)
        if not stream:
            query = select(JobEvent).where(JobEvent.job_id == job_id)
            if number is not None:
                query = query.where(JobEvent.number < number)
            query = query.order_by(JobEvent.number.desc()).limit(limit + 1)
            found = [event_object(event) for event in session.scalars(query)]
            return JSONResponse(listed(found[:limit], len(found) > limit))
    begin = _number(job_id, last_event_id, "Last-Event-ID") or number or 0
    held.enter_context(services.streams.held(caller.tenant_id))  # each asks the database for ever
    return StreamingResponse(
        _follow(services, credentials, job_id, begin),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _number(job_id: str, event: str | None, param: str) -> int | None:
    if event is None:
        return None
    number = event_number(job_id, event)
    if number is None:
        raise invalid(f"{param}: not an event of this job", param)
    return number


async def _follow(
    services: Services, credentials: Credentials, job_id: str, begin: int
) -> AsyncIterator[str]:
    seen, quiet_s = begin, 0.0
    yield "retry: 1000\n\n"
    while True:
        try:
            # Asked again each time: a key that is revoked reads nothing more.
            caller = await known_caller(services, credentials)
            events, finished = await run_in_threadpool(_after, services, caller, job_id, seen)
        except ApiError as error:
            yield f"event: error\ndata: {json.dumps({'message': str(error)})}\n\n"
            return
        for event in events:
            seen += 1
            yield f"id: {event['id']}\ndata: {json.dumps(event)}\n\n"
        if events:
            quiet_s = 0.0
            continue
        if finished:
            yield "data: [DONE]\n\n"
            return
        await asyncio.sleep(services.event_poll_s)
        quiet_s += services.event_poll_s
        if quiet_s >= _STILL_HERE_S:
            quiet_s = 0.0
            yield ": still here\n\n"


def _after(
    services: Services, caller: Caller, job_id: str, seen: int
) -> tuple[list[dict[str, Any]], bool]:
    """The next events, and whether the job has ended: no more will come after them."""
    with services.database.tenant_read(caller.tenant_id) as session:
        job = job_of(session, job_id)  # first: an event that comes after this is for the next time
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.number > seen)
        found = session.scalars(query.order_by(JobEvent.number).limit(_BATCH))
        events = [event_object(event) for event in found]
        return events, job.phase in FINAL and seen + len(events) >= job.events

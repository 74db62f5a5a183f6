"""Jobs: the list, one job, and what screening found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session, defer

from cluster.api.errors import invalid
from cluster.api.jobs import job_of
from cluster.api.objects import shown_phase
from cluster.api.pages.access import JobsViewer, SafetyViewer, reading
from cluster.api.pages.found import evaluation_of, screening_of
from cluster.api.pages.render import page as rendered
from cluster.api.pages.timeline import PATH, reached, timeline
from cluster.api.paging import After, page
from cluster.api.services import With
from cluster.api_errors import ApiError
from cluster.controller.phases import FINAL, STAGES, WAITING
from cluster.state.models import File, Job, JobEvent, PublishedModel, Stage, Tenant

router = APIRouter()
_A_PAGE, _EVENTS = 25, 50
_PHASES = (*WAITING, *STAGES, *FINAL)


@dataclass(frozen=True)
class Line:
    """A job in the list.

    Attributes:
        reached: of `steps` phases; None where the job has failed or was cancelled.
        said: its last event.
        done: of the current stage, in percent, where that was told.
    """

    id: str
    tenant: str
    base_model: str
    suffix: str | None
    phase: str
    created_at: float
    reached: int | None
    steps: int
    said: str | None
    done: int | None
    error_code: str | None


@router.get("/")
def jobs(
    request: Request,
    services: With,
    viewer: JobsViewer,
    after: After = None,
    phase: str | None = None,
) -> HTMLResponse:
    """The newest jobs, and how many are in each phase."""
    query = select(Job).options(defer(Job.facts))
    if phase is not None:
        if phase not in _PHASES:
            raise invalid(f"phase: must be one of {', '.join(_PHASES)}", "phase")
        query = query.where(Job.phase == phase)
    with reading(services, viewer) as session:
        found, more = page(session, query, Job, after, _A_PAGE)
        lines = _lines(session, found)
        by_phase = session.execute(select(Job.phase, func.count(Job.id)).group_by(Job.phase))
        counts = {name: count for name, count in by_phase}
    return rendered(
        request,
        "jobs.html.j2",
        viewer=viewer,
        live=True,
        lines=lines,
        counts=[(name, counts[name]) for name in _PHASES if name in counts],
        total=sum(counts.values()),
        phase=phase,
        after=after,
        last=found[-1].id if more else None,
    )


def _lines(session: Session, jobs: Sequence[Job]) -> list[Line]:
    ids = [job.id for job in jobs]
    last = select(JobEvent).join(
        Job, and_(Job.id == JobEvent.job_id, Job.events == JobEvent.number)
    )
    events = {e.job_id: e for e in session.scalars(last.where(Job.id.in_(ids)))}
    owners = select(Tenant).where(Tenant.id.in_({job.tenant_id for job in jobs}))
    names = {tenant.id: tenant.name for tenant in session.scalars(owners)}
    return [_line(job, names[job.tenant_id], events.get(job.id)) for job in jobs]


def _line(job: Job, tenant: str, event: JobEvent | None) -> Line:
    return Line(
        id=job.id,
        tenant=tenant,
        base_model=job.base_model,
        suffix=job.request.get("suffix"),
        phase=shown_phase(job),
        created_at=job.created_at,
        reached=None if job.phase in ("failed", "cancelled") else reached(job),
        steps=len(PATH),
        said=event.message if event else None,
        done=_done(job, event),
        error_code=job.error_code,
    )


def _done(job: Job, event: JobEvent | None) -> int | None:
    """How much of the stage is done, in percent, where its last event tells."""
    if event is None or job.phase not in STAGES:
        return None
    done, total = event.data.get("done"), event.data.get("total")
    if not isinstance(done, int) or not isinstance(total, int):
        return None
    return 100 * done // total if 0 <= done <= total and total else None


@router.get("/jobs/{job_id}")
def job(job_id: str, request: Request, services: With, viewer: JobsViewer) -> HTMLResponse:
    """One job: where it is, what was found, what was said."""
    with reading(services, viewer) as session:
        row = job_of(session, job_id)
        stages = session.scalars(
            select(Stage).where(Stage.job_id == job_id).order_by(Stage.attempt)
        ).all()
        events = session.scalars(
            select(JobEvent)
            .where(JobEvent.job_id == job_id)
            .order_by(JobEvent.number.desc())
            .limit(_EVENTS)
        ).all()
        named = [name for name in (row.training_file, row.validation_file) if name]
        files = session.scalars(select(File).where(File.id.in_(named))).all()
        model = session.scalars(
            select(PublishedModel).where(PublishedModel.id == row.model_id)
        ).one_or_none()
        [line] = _lines(session, [row])
    may = viewer.may("safety:read")
    return rendered(
        request,
        "job.html.j2",
        viewer=viewer,
        live=row.phase not in FINAL,
        job=row,
        line=line,
        steps=timeline(row, stages),
        events=events,
        files={file.id: file for file in files},
        model=model,
        may=may,
        screening=screening_of(row.facts) if may else None,
        measured=evaluation_of(row.facts) if may else None,
    )


@router.get("/jobs/{job_id}/screening")
def screening(job_id: str, request: Request, services: With, viewer: SafetyViewer) -> HTMLResponse:
    """The verdict on a job's dataset, and the rows behind it."""
    with reading(services, viewer) as session:
        row = job_of(session, job_id)
        file = session.scalars(select(File).where(File.id == row.training_file)).one_or_none()
    found = screening_of(row.facts)
    if found is None:
        raise ApiError(404, "The job's dataset has not been screened (yet)", code="not_yet")
    return rendered(request, "screening.html.j2", viewer=viewer, job=row, file=file, found=found)

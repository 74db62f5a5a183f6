"""For administrators: who has how much of the fleet, what waits, and the audit log's head."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import func, select

from cluster.api.pages.access import FleetViewer
from cluster.api.pages.render import page
from cluster.api.services import With
from cluster.controller.phases import COMPUTE, FINAL, INTAKE
from cluster.state.models import AuditEntry, Job, Tenant
from cluster.tenancy.quotas import gpu_seconds_by_tenant

router = APIRouter()
_ENTRIES = 20


@dataclass(frozen=True)
class Share:
    """A tenant, and what it has of the fleet.

    Attributes:
        gpu_seconds: worker-seconds of its ended stages.
    """

    tenant: Tenant
    waiting: int
    running: int
    gpu_seconds: float


@dataclass(frozen=True)
class Room:
    """One of the two queues: slots in use of those that there are, and since when who waits."""

    name: str
    used: int
    slots: int
    waiting: int
    oldest: float | None


@router.get("/fleet")
def fleet(request: Request, services: With, viewer: FleetViewer) -> HTMLResponse:
    """Queues, tenants, and the audit log's newest entries."""
    by_phase = select(
        Job.tenant_id, Job.phase, func.count(Job.id), func.sum(Job.slots), func.min(Job.phase_since)
    ).where(Job.phase.not_in(FINAL))
    with services.database.system_read() as session:
        tenants = session.scalars(select(Tenant).order_by(Tenant.name)).all()
        open_jobs = session.execute(by_phase.group_by(Job.tenant_id, Job.phase)).all()
        used = gpu_seconds_by_tenant(session)
        audit = session.scalars(
            select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(_ENTRIES)
        ).all()
    waiting: dict[str, int] = defaultdict(int)
    running: dict[str, int] = defaultdict(int)
    for tenant, phase, count, *_ in open_jobs:
        (running if phase in (*INTAKE, *COMPUTE) else waiting)[tenant] += count
    settings = services.settings
    rooms = []
    for name, stages, queue, slots in (
        ("Validating and screening", INTAKE, "submitted", settings.intake_slots),
        ("Training and after", COMPUTE, "queued", settings.compute_slots),
    ):
        busy = [row for row in open_jobs if row[1] in stages]
        queued = [row for row in open_jobs if row[1] == queue]
        rooms.append(
            Room(
                name=name,
                used=sum(int(row[2] if stages is INTAKE else row[3]) for row in busy),
                slots=slots,
                waiting=sum(row[2] for row in queued),
                oldest=min((row[4] for row in queued), default=None),
            )
        )
    return page(
        request,
        "fleet.html.j2",
        viewer=viewer,
        live=True,
        rooms=rooms,
        shares=[Share(t, waiting[t.id], running[t.id], used.get(t.id, 0.0)) for t in tenants],
        audit=audit,
    )

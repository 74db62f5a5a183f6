"""Admission: one short transaction gives waiting jobs the room that is free, never more."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import func, literal, select, update
from sqlalchemy.orm import Session

from cluster.controller.fair_share import Share, Waiting, admit
from cluster.controller.phases import COMPUTE, INTAKE, STAGES, after
from cluster.controller.transitions import enter
from cluster.state.models import Job, Lock, Tenant

Queue = Literal["intake", "compute"]
_WAIT: dict[Queue, str] = {"intake": "submitted", "compute": "queued"}
_STAGES: dict[Queue, tuple[str, ...]] = {"intake": INTAKE, "compute": COMPUTE}
_TOKENS = 1000.0  # of training in one unit of cost


def admit_waiting(session: Session, queue: Queue, capacity: int, now: float) -> list[str]:
    """Admit what fits, in the order of fair share; the ids of the admitted jobs."""
    # Whoever holds this row is the only one that admits, so what is free cannot be given twice.
    lock = session.scalars(
        select(Lock).where(Lock.name == queue).with_for_update(key_share=True)
    ).one()
    running = session.execute(
        select(Job.tenant_id, func.count(), func.sum(_slots(queue)))
        .where(Job.phase.in_(_STAGES[queue]))
        .group_by(Job.tenant_id)
    ).all()
    free = capacity - sum(int(slots) for _, _, slots in running)
    if free <= 0:
        return []
    waiting = _waiting(session, queue)
    if not waiting:
        return []
    counts = {tenant: count for tenant, count, _ in running}
    shares = _shares(session, queue, counts, {job.tenant for job in waiting})
    result = admit(waiting, shares, free=free, capacity=capacity, queue_time=lock.value)
    chosen = session.scalars(
        select(Job)
        .where(Job.id.in_(result.chosen), Job.phase == _WAIT[queue])
        .with_for_update(key_share=True)
    )
    admitted = []
    for job in chosen:  # one that was cancelled meanwhile is not among them
        goes_on = job.resume_phase in STAGES
        stage = job.resume_phase if goes_on and job.resume_phase else after(job.phase, "admitted")
        job.resume_phase = None
        enter(session, job, stage, now)
        admitted.append(job.id)
    lock.value = result.queue_time
    column = _time(queue)
    for tenant, time in result.times.items():
        session.execute(update(Tenant).where(Tenant.id == tenant).values({column: time}))
    return admitted


def somebody_waits(session: Session, queue: Queue) -> bool:
    """Whether there is anything to admit; a look that takes no lock."""
    first = select(Job.id).where(Job.phase == _WAIT[queue]).limit(1)
    return session.scalars(first).first() is not None


def _waiting(session: Session, queue: Queue) -> list[Waiting]:
    estimate = Job.facts["validating"]["estimated_tokens"].as_float()
    rows = session.execute(
        select(Job.id, Job.tenant_id, _slots(queue), Job.priority, Job.created_at, estimate).where(
            Job.phase == _WAIT[queue]
        )
    )
    return [
        Waiting(
            id=job_id,
            tenant=tenant,
            slots=slots,
            cost=1.0 if queue == "intake" else max(1.0, (tokens or 0.0) / _TOKENS),
            priority=priority,
            created_at=created_at,
        )
        for job_id, tenant, slots, priority, created_at, tokens in rows
    ]


def _shares(
    session: Session, queue: Queue, running: dict[str, int], tenants: set[str]
) -> dict[str, Share]:
    rows = session.execute(
        select(Tenant.id, Tenant.weight, _time(queue), Tenant.max_running_jobs).where(
            Tenant.suspended_at.is_(None)
        )
    )
    return {
        tenant: Share(weight, time, limit - running.get(tenant, 0))
        for tenant, weight, time, limit in rows
        if tenant in tenants
    }


def _slots(queue: Queue) -> Any:
    return Job.slots if queue == "compute" else literal(1)


def _time(queue: Queue) -> Any:
    return Tenant.intake_time if queue == "intake" else Tenant.compute_time

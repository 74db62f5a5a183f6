"""What a tenant may still have. Checked under the lock of the tenant's row, so never overrun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from cluster.controller.phases import STAGES, WAITING
from cluster.state import TenantSession, narrowed
from cluster.state.models import ChatUsage, File, Job, Stage, Tenant
from safeft.errors import SafeftError

# By the phases that count, and of nothing but them: then the index alone is looked at.
_JOBS, _TENANTS = Job.__table__, Tenant.__table__
_UNFINISHED = narrowed(
    select(func.count(_JOBS.c.phase)).where(_JOBS.c.phase.in_((*WAITING, *STAGES)))
)
#: The tenant's row, locked until the transaction ends. Not a plain FOR UPDATE: every row that
#: refers to the tenant holds its key shared already, and two requests that each held it and wanted
#: more would wait for each other.
LOCKED = narrowed(select(_TENANTS).with_for_update(key_share=True))
METERED = ("training", "evaluating", "restoring")
_SECONDS = func.sum((Stage.ended_at - Stage.started_at) * Stage.slots)


class QuotaExceeded(SafeftError):
    """The tenant has all that it may have; the message names the quota."""


@dataclass(frozen=True)
class Usage:
    """What a tenant has: jobs that are not finished, and worker-seconds that were used."""

    open_jobs: int
    gpu_seconds: float


def usage(session: TenantSession, tenant: Row[Any]) -> Usage:
    """What counts against its limits; `tenant` is its row, `LOCKED`."""
    limited = tenant.max_gpu_seconds is not None
    return Usage(
        open_jobs=session.rows(_UNFINISHED).scalar_one(),
        gpu_seconds=gpu_seconds(session, tenant.id) if limited else 0.0,
    )


def check_submit(tenant: Row[Any], used: Usage, besides: int = 0) -> None:
    """Raise QuotaExceeded unless one more job may be submitted besides so many new ones."""
    if used.open_jobs + besides >= tenant.max_open_jobs:
        raise QuotaExceeded(
            f"max_open_jobs: {tenant.max_open_jobs} jobs are open; wait for one or cancel it"
        )
    limit = tenant.max_gpu_seconds
    if limit is not None and used.gpu_seconds >= limit:
        raise QuotaExceeded(
            f"max_gpu_seconds: {used.gpu_seconds:.0f} of {limit:.0f} worker-seconds are used; ask "
            "an administrator for more"
        )


def storage_left(session: TenantSession, besides: str | None = None) -> int:
    """Bytes that the tenant may still store; for the file `besides`, in place of what it has."""
    limit = session.rows(LOCKED).one().max_storage_bytes
    return max(0, int(limit) - stored_bytes(session, besides))


def stored_bytes(session: TenantSession, besides: str | None = None) -> int:
    """Bytes of the tenant's files, without one of them, and what uploads under way have reserved;
    more than it may have, where that was lowered since."""
    counted = select(func.sum(File.bytes)).where(File.deleted_at.is_(None))
    if besides is not None:
        counted = counted.where(File.id != besides)
    return int(session.scalars(counted).one() or 0)


def gpu_seconds(session: Session, tenant_id: str, job_id: str | None = None) -> float:
    """Worker-seconds of finished stages of training, evaluation and restoration: of one of the
    tenant's jobs, or of all."""
    query = select(_SECONDS).where(Stage.tenant_id == tenant_id, Stage.stage.in_(METERED))
    if job_id is not None:
        query = query.where(Stage.job_id == job_id)
    return float(session.scalars(query).one() or 0.0)


def gpu_seconds_by_tenant(session: Session) -> dict[str, float]:
    """The same of every tenant that has any."""
    metered = select(Stage.tenant_id, _SECONDS).where(Stage.stage.in_(METERED))
    rows = session.execute(metered.group_by(Stage.tenant_id))
    return {tenant: float(seconds or 0.0) for tenant, seconds in rows}


def trained_tokens(session: TenantSession) -> float:
    """Tokens that the tenant's jobs have trained on, every epoch counted."""
    tokens = Job.facts["training"]["trained_tokens"].as_float()
    return float(session.scalars(select(func.sum(tokens)).select_from(Job)).one() or 0.0)


def check_chat(session: TenantSession, pending: int) -> None:
    """Raise QuotaExceeded if the tenant's tokens are used up.

    Asked before each request, which may then go over: nobody knows how long an answer will be.

    Args:
        pending: tokens that were used and are not written yet.
    """
    limit = session.scalars(select(Tenant.max_chat_tokens)).one()
    if limit is None:
        return
    used = chat_usage(session)
    tokens = used["prompt_tokens"] + used["completion_tokens"] + pending
    if tokens >= limit:
        raise QuotaExceeded(
            f"max_chat_tokens: {tokens} of {limit} tokens are used; ask an administrator for more"
        )


def chat_usage(session: TenantSession) -> dict[str, int]:
    """Requests to served models that were answered, and their tokens."""
    names = ("requests", "prompt_tokens", "completion_tokens")
    sums = [func.sum(getattr(ChatUsage, name)) for name in names]
    row = session.execute(select(*sums)).one()
    return {name: int(found or 0) for name, found in zip(names, row, strict=True)}


class RateLimiter:
    """A token bucket for each name (a tenant, mostly), of this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # name: tokens, when

    def wait_s(self, name: str, per_second: float, burst: float | None = None) -> float:
        """0 where a request may pass now, otherwise the seconds after which it may.

        Args:
            burst: how many may come at once; None: two seconds' worth.
        """
        now, room = self._clock(), max(1.0, 2 * per_second) if burst is None else burst
        with self._lock:
            tokens, since = self._buckets.get(name, (room, now))
            tokens = min(room, tokens + (now - since) * per_second)
            allowed = tokens >= 1.0
            self._buckets[name] = (tokens - 1.0 if allowed else tokens, now)
        return 0.0 if allowed else (1.0 - tokens) / per_second

"""What a tenant may still have. Checked under the lock of the tenant's row, so never overrun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cluster.controller.phases import STAGES, WAITING
from cluster.state import TenantSession
from cluster.state.models import File, Job, Stage, Tenant
from safeft.errors import SafeftError

# By the phases that count, and of nothing but them: then the index alone is looked at.
_UNFINISHED = select(func.count(Job.phase)).where(Job.phase.in_((*WAITING, *STAGES)))
# Not a plain FOR UPDATE: every row that refers to the tenant holds its key shared already, and two
# requests that each held it and wanted more would wait for each other.
_LOCKED = select(Tenant).with_for_update(key_share=True)
METERED = ("training", "evaluating", "restoring")


class QuotaExceeded(SafeftError):
    """The tenant has all that it may have; the message names the quota."""


def check_submit(session: TenantSession) -> Tenant:
    """The tenant, its row locked; QuotaExceeded unless one more job may be submitted."""
    tenant = _locked(session)
    if session.scalars(_UNFINISHED).one() >= tenant.max_open_jobs:
        raise QuotaExceeded(
            f"max_open_jobs: {tenant.max_open_jobs} jobs are open; wait for one or cancel it"
        )
    if tenant.max_gpu_seconds is not None:
        used = gpu_seconds(session, tenant.id)
        if used >= tenant.max_gpu_seconds:
            raise QuotaExceeded(
                f"max_gpu_seconds: {used:.0f} of {tenant.max_gpu_seconds:.0f} worker-seconds are "
                "used; ask an administrator for more"
            )
    return tenant


def storage_left(session: TenantSession, *, lock: bool = False) -> int:
    """Bytes that the tenant may still store."""
    tenant = _locked(session) if lock else session.scalars(select(Tenant)).one()
    return max(0, tenant.max_storage_bytes - stored_bytes(session))


def stored_bytes(session: TenantSession) -> int:
    """Bytes of the tenant's files; more than it may have, where that was lowered since."""
    used = session.scalars(select(func.sum(File.bytes)).where(File.deleted_at.is_(None))).one()
    return int(used or 0)


def gpu_seconds(session: Session, tenant_id: str) -> float:
    """Worker-seconds of the tenant's finished stages of training, evaluation and restoration."""
    seconds = (Stage.ended_at - Stage.started_at) * Stage.slots
    used = session.scalars(
        select(func.sum(seconds)).where(Stage.tenant_id == tenant_id, Stage.stage.in_(METERED))
    ).one()
    return float(used or 0.0)


def _locked(session: TenantSession) -> Tenant:
    return session.scalars(_LOCKED).one()


class RateLimiter:
    """A token bucket a tenant, of this process: two seconds' worth may come at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant: tokens, when

    def wait_s(self, tenant_id: str, per_second: float) -> float:
        """0 where a request may pass now, otherwise the seconds after which it may."""
        now, room = self._clock(), max(1.0, 2 * per_second)
        with self._lock:
            tokens, since = self._buckets.get(tenant_id, (room, now))
            tokens = min(room, tokens + (now - since) * per_second)
            allowed = tokens >= 1.0
            self._buckets[tenant_id] = (tokens - 1.0 if allowed else tokens, now)
        return 0.0 if allowed else (1.0 - tokens) / per_second

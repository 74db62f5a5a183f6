"""The first administrator, made by whoever can reach the database itself."""

from __future__ import annotations

from sqlalchemy import select

from cluster.state import Database
from cluster.state.models import Tenant
from cluster.tenancy.audit import record
from cluster.tenancy.keys import create_key
from cluster.tenancy.tenants import create_tenant

OPERATORS = "operators"


def first_key(database: Database, now: float) -> str:
    """A new administrator's key of the tenant "operators", which is made where there is none."""
    actor, reason = "local", "bootstrap on the control plane's machine"
    with database.system() as session:
        tenant = session.scalars(select(Tenant).where(Tenant.name == OPERATORS)).one_or_none()
        if tenant is None:
            tenant = create_tenant(session, OPERATORS, actor=actor, reason=reason, now=now)
        key, shown = create_key(session, tenant.id, name="bootstrap", now=now, role="admin")
        record(
            session,
            at=now,
            actor=actor,
            tenant_id=tenant.id,
            action="key.create",
            object_id=key.id,
            after={"role": "admin"},
            reason=reason,
        )
    return shown

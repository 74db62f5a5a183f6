"""/v1/safety/admin: tenants, their keys and policy, the audit log. Every change has a reason."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster.api.auth import Administrator
from cluster.api.errors import not_found
from cluster.api.idempotency import JsonPost, once_over_all
from cluster.api.safety import key_object, without_secret
from cluster.api.services import With
from cluster.state.models import ApiKey, Tenant
from cluster.tenancy.audit import entries, record
from cluster.tenancy.keys import SCOPES, Role, Scope, create_key
from cluster.tenancy.tenants import Limits, Policy, change_tenant, create_tenant, settings

router = APIRouter(prefix="/v1/safety/admin", tags=["administration"])
Reason = Annotated[str, Field(min_length=3, max_length=500)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    reason: Reason


class NewTenant(_Body):
    """Who is let in, with what."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
    limits: Limits = Limits()
    policy: Policy = Policy()


class TenantChange(_Body):
    """Each limit and each part of the policy that is given replaces what was; the rest stays."""

    limits: Limits | None = None
    policy: Policy | None = None
    suspended: bool | None = None


class NewKey(_Body):
    """A key for a tenant."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    role: Role = "tenant"
    scopes: list[Scope] = list(SCOPES)
    expires_at: Annotated[float, Field(gt=0, lt=1e11)] | None = None


@router.post("/tenants")
def new_tenant(
    body: NewTenant, services: With, caller: Administrator, request: JsonPost
) -> dict[str, Any]:
    """Let a tenant in."""
    now = services.clock()

    def effect(session: Session) -> dict[str, Any]:
        made = create_tenant(
            session,
            body.name,
            actor=caller.actor,
            reason=body.reason,
            now=now,
            limits=body.limits,
            policy=body.policy,
        )
        return _tenant_object(made)

    return once_over_all(services.database, caller, request, now, effect)


@router.get("/tenants")
def list_tenants(services: With, caller: Administrator) -> dict[str, Any]:
    """All tenants."""
    with services.database.system_read() as session:
        found = session.scalars(select(Tenant).order_by(Tenant.name))
        return {"object": "list", "data": [_tenant_object(tenant) for tenant in found]}


@router.post("/tenants/{tenant_id}")
def update_tenant(
    tenant_id: str, body: TenantChange, services: With, caller: Administrator, request: JsonPost
) -> dict[str, Any]:
    """Change a tenant's limits or policy, or suspend it."""
    now = services.clock()

    def effect(session: Session) -> dict[str, Any]:
        tenant = _tenant(session, tenant_id)
        change_tenant(
            session,
            tenant,
            actor=caller.actor,
            reason=body.reason,
            now=now,
            limits=body.limits,
            policy=body.policy,
            suspended=body.suspended,
        )
        return _tenant_object(tenant)

    return once_over_all(services.database, caller, request, now, effect)


@router.post("/tenants/{tenant_id}/keys")
def new_key(
    tenant_id: str, body: NewKey, services: With, caller: Administrator, request: JsonPost
) -> dict[str, Any]:
    """A key for a tenant. It is in this answer and nowhere else."""
    now = services.clock()

    def effect(session: Session) -> dict[str, Any]:
        tenant = _tenant(session, tenant_id)
        key, shown = create_key(
            session,
            tenant.id,
            name=body.name,
            now=now,
            role=body.role,
            scopes=body.scopes,
            expires_at=body.expires_at,
        )
        answer = {**key_object(key), "key": shown}
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=tenant.id,
            action="key.create",
            object_id=key.id,
            after={"role": key.role, "scopes": key.scopes, "expires_at": key.expires_at},
            reason=body.reason,
        )
        return answer

    return once_over_all(services.database, caller, request, now, effect, without_secret)


@router.post("/keys/{key_id}/revoke")
def revoke_key(
    key_id: str, body: _Body, services: With, caller: Administrator, request: JsonPost
) -> dict[str, Any]:
    """End any tenant's key at once."""
    now = services.clock()

    def effect(session: Session) -> dict[str, Any]:
        key = session.get(ApiKey, key_id, with_for_update={"key_share": True})
        if key is None:
            raise not_found("key", key_id)
        key.revoked_at = key.revoked_at or now
        answer = key_object(key)
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=key.tenant_id,
            action="key.revoke",
            object_id=key_id,
            reason=body.reason,
        )
        return answer

    return once_over_all(services.database, caller, request, now, effect)


@router.get("/audit")
def audit(
    services: With,
    caller: Administrator,
    after: Annotated[int, Query(ge=0, lt=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> dict[str, Any]:
    """The audit log from its beginning; `safeft audit verify` follows it."""
    with services.database.system_read() as session:
        data = [link.model_dump() for link in entries(session, after, limit)]
    return {"object": "list", "data": data, "has_more": len(data) == limit}


def _tenant(session: Session, tenant_id: str) -> Tenant:
    tenant = session.get(Tenant, tenant_id, with_for_update={"key_share": True})
    if tenant is None:
        raise not_found("tenant", tenant_id)
    return tenant


def _tenant_object(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "safety.tenant",
        "created_at": tenant.created_at,
        **settings(tenant),
    }

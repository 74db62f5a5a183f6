"""/v1/safety: what screening, evaluation and gate found, provenance, usage, the tenant's keys."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import func, select

from cluster.api.auth import AnyCaller, SafetyReader
from cluster.api.errors import not_found
from cluster.api.files import download
from cluster.api.idempotency import JsonPost, once
from cluster.api.jobs import job_of
from cluster.api.models import model_of
from cluster.api.services import With
from cluster.api_errors import ApiError
from cluster.artifacts.directory import DirectoryStore
from cluster.controller.phases import FINAL
from cluster.state import TenantSession
from cluster.state.models import ApiKey, Job, Stage, Tenant
from cluster.tenancy import cost, quotas
from cluster.tenancy.audit import record
from cluster.tenancy.keys import rotate_key
from cluster.tenancy.tenants import settings

router = APIRouter(prefix="/v1/safety", tags=["safety"])
_LINK_S = 300


@router.get("/jobs/{job_id}")
def job(job_id: str, services: With, caller: SafetyReader) -> dict[str, Any]:
    """What each finished stage of a job found, and every attempt with its time."""
    with services.database.tenant_read(caller.tenant_id) as session:
        row = job_of(session, job_id)
        stages = session.scalars(
            select(Stage).where(Stage.job_id == job_id).order_by(Stage.attempt)
        )
        return {
            "id": job_id,
            "object": "safety.job",
            "phase": row.phase,
            "phase_since": row.phase_since,
            "model": row.model_id if row.phase == "succeeded" else None,
            "facts": row.facts,
            "cost": _cost(services, session, row),
            "attempts": [
                {
                    "attempt": stage.attempt,
                    "stage": stage.stage,
                    "started_at": stage.started_at,
                    "ended_at": stage.ended_at,
                    "outcome": stage.outcome,
                }
                for stage in stages
            ],
        }


def _cost(services: With, session: TenantSession, job: Job) -> dict[str, Any] | None:
    price = services.settings.price
    if price is None:
        return None
    estimated = job.facts.get("validating", {}).get("estimated_tokens")
    trained = job.facts.get("training", {}).get("trained_tokens", 0)
    seconds = quotas.gpu_seconds(session, job.tenant_id, job.id)
    return {
        "currency": price.currency,
        "expected_for_tokens": cost.expected(price, estimated),
        "incurred": cost.incurred(price, trained, seconds),
    }


def _fact(services: With, caller: SafetyReader, job_id: str, stage: str) -> dict[str, Any]:
    with services.database.tenant_read(caller.tenant_id) as session:
        facts: dict[str, Any] = job_of(session, job_id).facts
    if stage not in facts:
        raise ApiError(404, f"The job has no result of {stage} (yet)", code="not_yet")
    return {"id": job_id, "object": f"safety.{stage}", **facts[stage]}


@router.get("/jobs/{job_id}/screening")
def screening(job_id: str, services: With, caller: SafetyReader) -> dict[str, Any]:
    """The verdict on the dataset, and which rows are behind it."""
    return _fact(services, caller, job_id, "screening")


@router.get("/jobs/{job_id}/evaluation")
def evaluation(job_id: str, services: With, caller: SafetyReader) -> dict[str, Any]:
    """Refusals before and after, and what the gate made of them."""
    return _fact(services, caller, job_id, "evaluating")


@router.get("/models/{model_id}")
def model(model_id: str, services: With, caller: SafetyReader) -> dict[str, Any]:
    """The model's gate state, its signed provenance, and links to its files (short-lived)."""
    with services.database.tenant_read(caller.tenant_id) as session:
        row = model_of(session, model_id)
    keys = list(services.store.keys(f"{row.prefix}/"))
    names = [key.removeprefix(f"{row.prefix}/") for key in keys]
    return {
        "id": model_id,
        "object": "safety.model",
        "state": row.state,
        "job": row.job_id,
        "provenance": row.provenance,
        "files": {
            name: services.store.link(key, _LINK_S, name)
            for name, key in zip(names, keys, strict=True)
        },
    }


@router.get("/signing-key", response_class=PlainTextResponse)
def signing_key(services: With, caller: SafetyReader) -> PlainTextResponse:
    """The public key that provenance is checked with. Compare it with one you got elsewhere."""
    return PlainTextResponse(services.public_key.pem)


@router.get("/usage")
def usage(services: With, caller: SafetyReader) -> dict[str, Any]:
    """What the tenant has used, and what it may use."""
    with services.database.tenant_read(caller.tenant_id) as session:
        tenant = session.scalars(select(Tenant)).one()
        unfinished = select(func.count(Job.id)).where(Job.phase.not_in(FINAL))
        return {
            "object": "safety.usage",
            "gpu_seconds": quotas.gpu_seconds(session, tenant.id),
            "stored_bytes": quotas.stored_bytes(session),
            "chat": quotas.chat_usage(session),
            "cost": _cost_of_all(services, session, tenant.id),
            "open_jobs": session.scalars(unfinished).one(),
            "limits": settings(tenant),
        }


def _cost_of_all(services: With, session: TenantSession, tenant: str) -> dict[str, Any] | None:
    price = services.settings.price
    if price is None:
        return None
    tokens, seconds = quotas.trained_tokens(session), quotas.gpu_seconds(session, tenant)
    return {"currency": price.currency, **cost.incurred(price, tokens, seconds)}


@router.get("/downloads/{token}", response_class=StreamingResponse)
def follow(token: str, services: With) -> StreamingResponse:
    """A link of a directory store. It needs no key, and ends soon."""
    if not isinstance(services.store, DirectoryStore):
        raise not_found("download", token)
    key, filename = services.store.follow(token)
    return download(services.store.read(key), filename)


@router.get("/keys")
def list_keys(services: With, caller: AnyCaller) -> dict[str, Any]:
    """The tenant's keys, without their secrets."""
    with services.database.tenant_read(caller.tenant_id) as session:
        keys = session.scalars(select(ApiKey).order_by(ApiKey.created_at))
        return {"object": "list", "data": [key_object(key) for key in keys]}


@router.post("/keys/{key_id}/rotate")
def rotate(
    key_id: str, services: With, caller: AnyCaller, request: JsonPost, overlap_s: float = 0.0
) -> dict[str, Any]:
    """A new key in place of this one, which ends after `overlap_s` seconds (at most a week).

    The new key is in this answer and nowhere else: the same request again does not show it.
    """
    if not 0.0 <= overlap_s <= 7 * 86400:
        raise ApiError(400, "overlap_s: must be from 0 to 604800", param="overlap_s")
    now = services.clock()

    def effect(session: TenantSession) -> dict[str, Any]:
        key = _own_key(session, caller, key_id)
        new, shown = rotate_key(session, key, now=now, overlap_s=overlap_s)
        answer = {**key_object(new), "key": shown}
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=caller.tenant_id,
            action="key.rotate",
            object_id=key_id,
            after={"new": new.id, "overlap_s": overlap_s},
        )
        return answer

    return once(services.database, caller, request, now, effect, without_secret)[0]


@router.post("/keys/{key_id}/revoke")
def revoke(key_id: str, services: With, caller: AnyCaller, request: JsonPost) -> dict[str, Any]:
    """End a key at once."""
    now = services.clock()

    def effect(session: TenantSession) -> dict[str, Any]:
        key = _own_key(session, caller, key_id)
        key.revoked_at = key.revoked_at or now
        answer = key_object(key)
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=caller.tenant_id,
            action="key.revoke",
            object_id=key_id,
        )
        return answer

    return once(services.database, caller, request, now, effect)[0]


def _own_key(session: TenantSession, caller: AnyCaller, key_id: str) -> ApiKey:
    """A tenant's key acts on itself; an administrator's on every key of its tenant."""
    if caller.role != "admin" and key_id != caller.key_id:
        raise ApiError(403, "A key may change itself only", code="not_an_administrator")
    # Locked: a key that is being revoked is not turned into a new one meanwhile.
    query = select(ApiKey).where(ApiKey.id == key_id).with_for_update(key_share=True)
    key = session.scalars(query).one_or_none()
    if key is None:
        raise not_found("key", key_id)
    return key


def key_object(key: ApiKey) -> dict[str, Any]:
    """A key, but for its secret."""
    return {
        "id": key.id,
        "object": "safety.key",
        "name": key.name,
        "prefix": f"sf-{key.prefix}",
        "tenant": key.tenant_id,
        "role": key.role,
        "scopes": key.scopes,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def without_secret(answer: dict[str, Any]) -> dict[str, Any]:
    """What may be kept of an answer that shows a key."""
    return {**answer, "key": None}

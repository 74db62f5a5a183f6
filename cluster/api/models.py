"""/v1/models: what can be tuned, and what the tenant has published."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from cluster.api.auth import ModelsReader, ModelsWriter
from cluster.api.errors import not_found
from cluster.api.objects import model_object
from cluster.api.services import With
from cluster.api_errors import ApiError
from cluster.artifacts.names import model_prefix
from cluster.state.models import Job, PublishedModel
from cluster.tenancy.audit import record

router = APIRouter(prefix="/v1/models", tags=["models"])


def _base_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "system"}


def published() -> Select[PublishedModel]:
    """Models that are not deleted."""
    return select(PublishedModel).where(PublishedModel.deleted_at.is_(None))


def model_of(session: Session, model_id: str) -> PublishedModel:
    """Raises ApiError 404 where the tenant has no such model."""
    found = session.scalars(published().where(PublishedModel.id == model_id)).one_or_none()
    if found is None:
        raise not_found("model", model_id)
    return found


@router.get("")
def list_models(services: With, caller: ModelsReader) -> dict[str, Any]:
    """Base models, and the tenant's own."""
    with services.database.tenant_read(caller.tenant_id) as session:
        own = session.scalars(published().order_by(PublishedModel.created_at.desc()))
        data = [model_object(model) for model in own]
    base = [_base_object(name) for name in services.settings.base_models]
    return {"object": "list", "data": [*base, *data]}


@router.get("/{model_id}")
def retrieve(model_id: str, services: With, caller: ModelsReader) -> dict[str, Any]:
    """One model."""
    if model_id in services.settings.base_models:
        return _base_object(model_id)
    with services.database.tenant_read(caller.tenant_id) as session:
        return model_object(model_of(session, model_id))


@router.delete("/{model_id}")
def delete(model_id: str, services: With, caller: ModelsWriter) -> dict[str, Any]:
    """Delete a published model and its weights. Its name is never used again."""
    if model_id in services.settings.base_models:
        raise ApiError(403, "A base model cannot be deleted", code="base_model")
    now = services.clock()
    with services.database.tenant(caller.tenant_id) as session:
        model = model_of(session, model_id)
        before = model.state
        model.deleted_at, model.state = now, "deleted"
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=caller.tenant_id,
            action="model.delete",
            object_id=model_id,
            before={"state": before},
        )
        made_by = session.scalars(select(Job.id).where(Job.model_id == model_id)).all()
        # Of every version: it may have been restored.
        prefixes = {model.prefix, *(model_prefix(caller.tenant_id, job) for job in made_by)}
    for prefix in prefixes:
        for key in list(services.store.keys(f"{prefix}/")):
            services.store.delete(key)
    return {"id": model_id, "object": "model", "deleted": True}

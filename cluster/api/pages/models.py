"""Published models: their gate states, and who vouches for them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import select

from cluster.api.models import model_of, published
from cluster.api.pages.access import ModelsViewer, SafetyViewer, reading
from cluster.api.pages.found import evaluation_of, provenance_of
from cluster.api.pages.render import page
from cluster.api.services import With
from cluster.state.models import Job, PublishedModel

router = APIRouter()
_SHOWN = 200


@router.get("/models")
def models(request: Request, services: With, viewer: ModelsViewer) -> HTMLResponse:
    """The published models, newest first, and the base models."""
    query = published().order_by(PublishedModel.created_at.desc()).limit(_SHOWN + 1)
    with reading(services, viewer) as session:
        found = session.scalars(query).all()
    return page(
        request,
        "models.html.j2",
        viewer=viewer,
        live=True,
        models=found[:_SHOWN],
        more=len(found) > _SHOWN,
        base_models=sorted(services.settings.base_models),
    )


@router.get("/models/{model_id}")
def model(model_id: str, request: Request, services: With, viewer: SafetyViewer) -> HTMLResponse:
    """One model: its gate state, its evaluation, its manifest."""
    with reading(services, viewer) as session:
        row = model_of(session, model_id)
        provenance = provenance_of(row.provenance, services.public_key)
        # What it was measured as: a restoration's job made another version than the first one's.
        made_by = provenance.statement.job if provenance else row.job_id
        maker = session.scalars(select(Job).where(Job.id == made_by)).one_or_none()
    facts = maker.facts if maker else {}
    return page(
        request,
        "model.html.j2",
        viewer=viewer,
        live=True,
        model=row,
        measured=evaluation_of(facts),
        made_by=made_by,
        provenance=provenance,
        manifest=facts.get("publishing", {}).get("manifest_sha256"),
    )

"""The administrators' routes: what is served, who is quarantined, and why. Behind a token."""

from __future__ import annotations

import hmac
from dataclasses import asdict
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.api_errors import ApiError
from cluster.gate.record import Event, OnQuarantine, Record
from cluster.serving.registry import Published


class Keepers(Protocol):
    """The keeper, wherever it runs."""

    async def register(self, model: str, directory: str, on_quarantine: OnQuarantine) -> Record:
        """See Keeper.register."""

    async def register_published(
        self, model: str, published: Published, base_weights: str, on_quarantine: OnQuarantine
    ) -> Record:
        """See Keeper.register_published."""

    async def decide(self, action: str, model: str, actor: str, reason: str) -> Record | None:
        """See Keeper.decide."""

    async def records(self) -> list[Record]:
        """See Keeper.records."""

    async def events(self, model: str | None, limit: int) -> list[Event]:
        """See Keeper.events."""

    async def probe_now(self, model: str) -> None:
        """See Keeper.probe_now."""


class ArtifactBody(BaseModel):
    """A published adapter, as its provenance names it."""

    model_config = ConfigDict(extra="forbid")
    prefix: str
    files: dict[str, str]
    base_weights: str


class RegisterBody(BaseModel):
    """``POST /admin/models``: an adapter in a directory, or a published one."""

    model_config = ConfigDict(extra="forbid")
    model: str
    adapter: str | None = None
    artifact: ArtifactBody | None = None
    on_quarantine: OnQuarantine = "unavailable"

    @model_validator(mode="after")
    def _one_place(self) -> RegisterBody:
        if (self.adapter is None) == (self.artifact is None):
            raise ValueError("adapter: give a directory or an artifact, one of both")
        return self


class DecisionBody(BaseModel):
    """``POST /admin/decisions``."""

    model_config = ConfigDict(extra="forbid")
    action: str
    model: str
    reason: str = Field(min_length=1)
    actor: str = Field(min_length=1, max_length=128)


class ProbeBody(BaseModel):
    """``POST /admin/probes``."""

    model_config = ConfigDict(extra="forbid")
    model: str


def add_admin(app: FastAPI, keeper: Keepers, token: str) -> None:
    """Add the routes under ``/admin`` for whoever has the token."""

    async def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise ApiError(
                401,
                "an administrator's token is needed",
                "invalid_api_key",
                kind="authentication_error",
            )

    guard = [Depends(allowed)]

    async def models() -> JSONResponse:
        return JSONResponse([shown(record) for record in await keeper.records()])

    async def events(model: str | None = None, limit: int = 100) -> JSONResponse:
        found = await keeper.events(model, max(1, min(limit, 1000)))
        return JSONResponse([asdict(event) for event in found])

    async def register(body: RegisterBody) -> JSONResponse:
        if body.adapter is not None:
            record = await keeper.register(body.model, body.adapter, body.on_quarantine)
        else:
            assert body.artifact is not None
            where = Published(body.artifact.prefix, body.artifact.files)
            record = await keeper.register_published(
                body.model, where, body.artifact.base_weights, body.on_quarantine
            )
        return JSONResponse(shown(record), 201)

    async def decide(body: DecisionBody) -> JSONResponse:
        record = await keeper.decide(body.action, body.model, body.actor, body.reason)
        return JSONResponse(None if record is None else shown(record))

    async def probe(body: ProbeBody) -> JSONResponse:
        await keeper.probe_now(body.model)
        return JSONResponse({"model": body.model}, 202)

    app.add_api_route("/admin/models", models, methods=["GET"], dependencies=guard)
    app.add_api_route("/admin/models", register, methods=["POST"], dependencies=guard)
    app.add_api_route("/admin/events", events, methods=["GET"], dependencies=guard)
    app.add_api_route("/admin/decisions", decide, methods=["POST"], dependencies=guard)
    app.add_api_route("/admin/probes", probe, methods=["POST"], dependencies=guard)


def shown(record: Record) -> dict[str, Any]:
    """A record as administrators see it."""
    rates = {probe: record.rate(probe) for probe in ("harmful", "benign")}
    return {
        "model": record.model,
        "weights": record.weights,
        "version": record.version,
        "state": record.state.value,
        "since": record.since,
        "reason": record.reason,
        "on_quarantine": record.on_quarantine,
        "cleared_at": record.cleared_at,
        "healthy_until": record.healthy_until,
        "failures": record.failures,
        "floor": record.policy.refusals.bad,
        "ceiling": record.policy.over_refusals.bad,
        "refusals": {kind: rate.to_dict() if rate else None for kind, rate in rates.items()},
    }

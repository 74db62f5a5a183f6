"""The API as one ASGI application. Stateless: as many processes of it as one likes."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api import admin, chat, errors, events, files, jobs, models, pages, reviews, safety
from cluster.api.services import Services
from safeft import __version__

_MAX_JSON_BYTES = 256 * 1024
_BODY_S = 30.0
_UPLOADS = "/v1/files"  # bounds its body itself


def create_app(services: Services) -> FastAPI:
    """The API over `services`; mount it, or serve it by itself.

    Other routers (metrics) may be added to what is returned: errors anywhere in it are
    answered in OpenAI's shape.
    """
    app = FastAPI(
        title="safeft",
        version=__version__,
        description="Safe fine-tuning for many tenants: OpenAI's API, and what keeps it safe.",
        docs_url=None,  # FastAPI's loads scripts from elsewhere: see `cluster.api.pages.reference`
        redoc_url=None,
    )
    app.state.services = services
    errors.install(app)
    for module in (files, events, jobs, models, chat, safety, admin, reviews):
        app.include_router(module.router)

    @app.get("/healthz", include_in_schema=False)
    def healthz() -> dict[str, str]:
        services.database.require_current()
        return {"status": "ok"}

    @app.get("/docs", include_in_schema=False)
    def docs() -> RedirectResponse:
        return RedirectResponse(f"{pages.ROOT}/reference")

    app.mount(pages.ROOT, pages.create_pages(services, app.openapi))
    app.add_middleware(_BoundedBody)
    return app


class _BoundedBody:
    """No request body but an upload's has more than 256 KiB, whatever its headers say."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _UPLOADS:
            await self._app(scope, receive, send)
            return
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is the end of the connection: that may take its time
                return await receive()
            try:
                async with asyncio.timeout(_BODY_S):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"No more of the body came for {_BODY_S:g} s") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > _MAX_JSON_BYTES:
                raise HTTPException(413, f"The body has more than {_MAX_JSON_BYTES} bytes")
            return message

        await self._app(scope, bounded, send)

"""The pages as an application of their own, with their own errors and headers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api import errors
from cluster.api.pages import access, fleet, jobs, models, reference
from cluster.api.pages.render import page
from cluster.api.services import Services
from cluster.api_errors import ApiError

#: Nothing from elsewhere, no script or style in a page, nobody's frame, forms to us only.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_pages(services: Services, document: Callable[[], dict[str, Any]]) -> ASGIApp:
    """The pages over `services`, to be mounted at `render.ROOT`.

    Args:
        document: makes the API's OpenAPI document.
    """
    app = FastAPI(openapi_url=None)
    app.state.services, app.state.document = services, document
    errors.install(app, _shown)
    for module in (access, jobs, models, fleet, reference):
        app.include_router(module.router)
    look = str(files("jobs") / "report" / "style.css")

    @app.get("/assets/style.css")
    def style() -> FileResponse:
        """The reports' style: the pages look like them."""
        return FileResponse(look)

    app.mount("/assets", StaticFiles(directory=str(files("cluster.api.pages") / "assets")))
    return _Headers(app)


def _shown(request: Request, error: ApiError) -> Response:
    if error.status == 401:
        return access.login_page(request, access.here(request), str(error), 401)
    return page(
        request,
        "error.html.j2",
        status=error.status,
        headers=error.headers,
        code=error.status,
        message=str(error),
    )


class _Headers:
    """On every answer, errors and assets among them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, with_headers)

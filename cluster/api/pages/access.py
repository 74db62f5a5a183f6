"""Who looks: login, logout, and the session behind each page."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from cluster.api.auth import administrator, with_scope, within_rate
from cluster.api.pages.render import ROOT, page
from cluster.api.services import Services, With
from cluster.api_errors import ApiError
from cluster.tenancy.browser_sessions import (
    SESSION_S,
    close_session,
    open_session,
    session_caller,
)
from cluster.tenancy.keys import Caller, Scope

router = APIRouter()
_HOME = f"{ROOT}/"
_BACK = re.compile(re.escape(_HOME) + r"[\w:/.~%?=&+-]*", re.ASCII)
_LOGINS_A_SECOND, _LOGINS_AT_ONCE = 0.2, 10
_BUCKETS = 4096  # so that addresses without number take no memory without bound


def _viewer(request: Request, services: With) -> Caller:
    token = request.cookies.get(_cookie(request))
    caller = session_caller(services.database, token, services.clock()) if token else None
    if caller is None:
        raise ApiError(401, "Your session has ended" if token else "")
    return within_rate(services, caller)


AnyViewer = Annotated[Caller, Depends(_viewer)]


def _with(scope: Scope) -> Callable[[Caller], Caller]:
    def check(viewer: AnyViewer) -> Caller:
        return with_scope(viewer, scope)

    return check


def _administrator(viewer: AnyViewer) -> Caller:
    return administrator(viewer)


JobsViewer = Annotated[Caller, Depends(_with("jobs:read"))]
ModelsViewer = Annotated[Caller, Depends(_with("models:read"))]
SafetyViewer = Annotated[Caller, Depends(_with("safety:read"))]
FleetViewer = Annotated[Caller, Depends(_administrator)]


@contextmanager
def reading(services: Services, viewer: Caller) -> Iterator[Session]:
    """The rows that the viewer may see: an administrator's are all, a tenant's are its own."""
    if viewer.role == "admin":
        with services.database.system_read() as session:
            yield session
    else:
        with services.database.tenant_read(viewer.tenant_id) as narrowed:
            yield narrowed


@router.get("/login")
def ask(request: Request) -> Response:
    """The form."""
    return login_page(request, _HOME)


@router.post("/login")
def log_in(
    request: Request,
    services: With,
    key: Annotated[str, Form(max_length=200)],
    back: Annotated[str, Form(max_length=2000)] = _HOME,
) -> Response:
    """A key against a cookie that holds nothing of it."""
    _require_own_form(request)
    wait = services.rates.wait_s(_login_bucket(request), _LOGINS_A_SECOND, _LOGINS_AT_ONCE)
    if wait > 0:
        raise ApiError(
            429,
            "Too many attempts to log in; wait a little",
            headers={"Retry-After": str(math.ceil(wait))},
        )
    token = open_session(services.database, key.strip(), services.clock())
    if token is None:
        told = "This key opens nothing: it is wrong, has ended, or its tenant is suspended"
        return login_page(request, back, told, 401)
    answer = RedirectResponse(back if _BACK.fullmatch(back) else _HOME, 303)
    answer.set_cookie(
        _cookie(request),
        token,
        max_age=int(SESSION_S),
        httponly=True,
        samesite="strict",
        secure=_secure(request),
    )
    return answer


@router.post("/logout")
def log_out(request: Request, services: With) -> Response:
    """End the session, here and in the database."""
    _require_own_form(request)
    token = request.cookies.get(_cookie(request))
    if token:
        close_session(services.database, token)
    answer = RedirectResponse(f"{ROOT}/login", 303)
    answer.delete_cookie(
        _cookie(request), httponly=True, samesite="strict", secure=_secure(request)
    )
    return answer


def login_page(request: Request, back: str, message: str = "", status: int = 200) -> Response:
    """The form, with what went wrong before."""
    return page(request, "login.html.j2", status=status, back=back, message=message)


def here(request: Request) -> str:
    """The address that was asked for, as a path."""
    query = request.url.query
    return f"{request.url.path}?{query}" if query else request.url.path


def _secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _cookie(request: Request) -> str:
    """`__Host-`: a browser takes it from this very host only, and over TLS only."""
    return "__Host-safeft" if _secure(request) else "safeft"


def _require_own_form(request: Request) -> None:
    """Raise ApiError 403 where another site's page sent the form.

    Browsers tell who sent it; what tells nothing is no browser, and has nobody's cookies.
    """
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        own = site in ("same-origin", "none")
    else:
        own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not own:
        raise ApiError(403, "This form was sent from another site")


def _login_bucket(request: Request) -> str:
    """Attempts are counted by address; of IPv6, by what one customer has."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        if address.version == 6:
            host = str(ipaddress.ip_network((address, 64), strict=False))
    return f"login:{hash(host) % _BUCKETS}"

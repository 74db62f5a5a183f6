"""Who calls, what their key allows, and how often."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from cluster.api.services import Services, With
from cluster.api_errors import ApiError
from cluster.tenancy.keys import Caller, Scope

_bearer = HTTPBearer(auto_error=False, description="An API key: `sf-...`")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def known_caller(
    services: Services, credentials: HTTPAuthorizationCredentials | None
) -> Caller:
    """The caller.

    Raises:
        ApiError: 401, whatever is wrong with the key.
    """
    shown = credentials.credentials if credentials else ""
    caller = await services.callers.join("all", shown)
    if caller is None:
        raise ApiError(
            401,
            "Incorrect API key provided; send `Authorization: Bearer sf-...` with a valid one",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return caller


def within_rate(services: Services, caller: Caller) -> Caller:
    """The caller.

    Raises:
        ApiError: 429, the tenant asks too often.
    """
    wait = services.rates.wait_s(caller.tenant_id, caller.requests_per_second)
    if wait > 0:
        raise ApiError(
            429,
            f"More than {caller.requests_per_second:g} requests a second; slow down",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(math.ceil(wait))},
        )
    return caller


def with_scope(caller: Caller, scope: Scope) -> Caller:
    """The caller.

    Raises:
        ApiError: 403, the key was not given this scope.
    """
    if not caller.may(scope):
        raise ApiError(403, f"This key lacks the scope {scope}", code="missing_scope")
    return caller


def administrator(caller: Caller) -> Caller:
    """The caller.

    Raises:
        ApiError: 403, the key is no administrator's.
    """
    if caller.role != "admin":
        raise ApiError(403, "Only an administrator's key may do this", code="not_an_administrator")
    return caller


async def _limited(services: With, credentials: Credentials) -> Caller:
    return within_rate(services, await known_caller(services, credentials))


AnyCaller = Annotated[Caller, Depends(_limited)]


def _with(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    async def check(caller: AnyCaller) -> Caller:
        return with_scope(caller, scope)

    return check


async def _administrator(caller: AnyCaller) -> Caller:
    return administrator(caller)


FilesReader = Annotated[Caller, Depends(_with("files:read"))]
FilesWriter = Annotated[Caller, Depends(_with("files:write"))]
JobsReader = Annotated[Caller, Depends(_with("jobs:read"))]
JobsWriter = Annotated[Caller, Depends(_with("jobs:write"))]
ModelsReader = Annotated[Caller, Depends(_with("models:read"))]
ModelsWriter = Annotated[Caller, Depends(_with("models:write"))]
SafetyReader = Annotated[Caller, Depends(_with("safety:read"))]
Chatter = Annotated[Caller, Depends(_with("chat"))]
Administrator = Annotated[Caller, Depends(_administrator)]

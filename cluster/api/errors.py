"""What the exceptions of jobs, files and state mean to a client."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from cluster import api_errors
from cluster.api_errors import ApiError, invalid_request
from cluster.artifacts import ArtifactMissing, ArtifactTooLarge, ArtifactUnavailable
from cluster.state import UNAVAILABLE, DatabaseError
from cluster.tenancy.quotas import QuotaExceeded
from safeft.errors import InputError

log = logging.getLogger(__name__)
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large"}
_RETRY_S = "5"
_FIELD = re.compile(r"([A-Za-z_.0-9]+): ")


def not_found(what: str, given: str) -> ApiError:
    """The same for what does not exist and for what is another tenant's."""
    return ApiError(404, f"No such {what}: {given[:80]!r}", code="not_found", param="id")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, param=param, code=code)


def told(error: Exception) -> ApiError:
    """What an exception of the layers below means to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid_request(error)
    if isinstance(error, ClientDisconnect):  # nobody reads this
        return invalid("The connection was closed")
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code=code)
    if isinstance(error, QuotaExceeded):
        return ApiError(429, str(error), code="insufficient_quota", kind="insufficient_quota")
    if isinstance(error, ArtifactTooLarge):
        return ApiError(413, f"The file has {error}", code="too_large", param="file")
    if isinstance(error, ArtifactMissing):
        return ApiError(404, str(error), code="not_found")
    if isinstance(error, InputError):
        named = _FIELD.match(str(error))
        return invalid(str(error), named[1] if named else None)
    if isinstance(error, DataError):  # such as a NUL, which PostgreSQL has no place for
        return invalid("The request holds a value that cannot be looked up or stored")
    if isinstance(error, (ArtifactUnavailable, *UNAVAILABLE)):
        why = str(error) if isinstance(error, DatabaseError) else type(error).__name__
        log.error("unavailable: %s", why)
        return ApiError(
            503,
            "A part of the service does not answer; try again",
            code="unavailable",
            headers={"Retry-After": _RETRY_S},
        )
    log.error("a request failed", exc_info=error)
    return ApiError(500, "Internal error", code="internal_error")


def install(app: FastAPI, shown: Callable[[Request, ApiError], Response] | None = None) -> None:
    """Answer every exception in OpenAI's shape, or as `shown` makes it."""
    api_errors.install(app, told, *UNAVAILABLE, ClientDisconnect, shown=shown)

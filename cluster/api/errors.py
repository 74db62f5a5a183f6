"""Every error in the shape the official client reads: message, type, param and code."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, DBAPIError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.artifacts import ArtifactMissing, ArtifactTooLarge, ArtifactUnavailable
from cluster.tenancy.quotas import QuotaExceeded
from safeft.errors import InputError, SafeftError

log = logging.getLogger(__name__)
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large"}
_RETRY_S = "5"
_FIELD = re.compile(r"([A-Za-z_.0-9]+): ")


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.kind = status, code, param, kind
        self.headers = headers


def not_found(what: str, given: str) -> ApiError:
    """The same for what does not exist and for what is another tenant's."""
    return ApiError(404, f"No such {what}: {given[:80]!r}", code="not_found", param="id")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, param=param, code=code)


def answer(error: ApiError) -> JSONResponse:
    """The error as an HTTP answer."""
    content: dict[str, Any] = {
        "error": {
            "message": str(error),
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }
    return JSONResponse(content, error.status, headers=error.headers)


def told(error: Exception) -> ApiError:
    """What an exception of the layers below means to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "header")]
        message = first["msg"].removeprefix("Value error, ")
        param = ".".join(where) or None
        return invalid(f"{param}: {message}" if param else message, param)
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
    if isinstance(error, (ArtifactUnavailable, DBAPIError)):
        log.error("unavailable: %s", type(error).__name__)
        return ApiError(
            503,
            "A part of the service does not answer; try again",
            code="unavailable",
            kind="server_error",
            headers={"Retry-After": _RETRY_S},
        )
    log.error("a request failed", exc_info=error)
    return ApiError(500, "Internal error", code="internal_error", kind="server_error")


def install(
    app: FastAPI, shown: Callable[[Request, ApiError], Response] = lambda _, error: answer(error)
) -> None:
    """Answer every exception in this way; `shown` makes the answer."""

    async def handle(request: Request, error: Exception) -> Response:
        return shown(request, told(error))

    kinds = (
        *(ApiError, RequestValidationError, HTTPException),
        *(SafeftError, DBAPIError, Exception),
    )
    for kind in kinds:
        app.add_exception_handler(kind, handle)

"""Errors as OpenAI's clients read them: a status, and an object with message, type, param, code.

Jobs' API and the serving gateway share these shapes; each says itself what the exceptions of the
layers below it mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from safeft.errors import SafeftError


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs.
        param: the field of the request that is wrong.
        kind: OpenAI's type of error; by default what belongs to the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        usual = "server_error" if status >= 500 else "invalid_request_error"
        self.kind = kind or ("rate_limit_error" if status == 429 else usual)
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """What is sent."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """As an answer by itself."""
        return JSONResponse(self.body(), self.status, headers=self.headers)

    def event(self) -> str:
        """As an event in a stream that has begun."""
        return f"data: {json.dumps(self.body())}\n\n"


def invalid_request(error: RequestValidationError, code: str | None = None) -> ApiError:
    """The first thing that is wrong with a request, and where."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "header")]
    param = ".".join(where) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, code, param)


def install(
    app: FastAPI,
    translate: Callable[[Exception], ApiError],
    *more: type[Exception],
    shown: Callable[[Request, ApiError], Response] | None = None,
) -> None:
    """Answer every exception of `app` in this shape.

    Args:
        more: kinds that are expected: unlike a bug, the server does not log them as its own fault.
        shown: makes another answer of it, for people.
    """

    async def handle(request: Request, error: Exception) -> Response:
        found = translate(error)
        return shown(request, found) if shown else found.response()

    known = (ApiError, RequestValidationError, HTTPException, SafeftError)
    for kind in (*known, *more, Exception):
        app.add_exception_handler(kind, handle)

"""Errors as OpenAI's clients expect them: a status, and an object with message, type and code."""

from __future__ import annotations

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from cluster.serving.engine import EngineError, QueueFull
from safeft.errors import InputError, ModelError, RowErrors, SafeftError

#: OpenAI's clients try a 5xx again, unless they are told that it is no use.
NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs.
        param: the field of the request that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kinds = {400: "invalid_request_error", 401: "authentication_error"}
        kinds |= {404: "invalid_request_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """As an answer by itself."""
        return JSONResponse(self.body(), self.status, headers=self.headers)

    def event(self) -> str:
        """As an event in a stream that has begun."""
        return f"data: {json.dumps(self.body())}\n\n"


def no_such_model(model: str) -> ApiError:
    """The same for a model that is not there and for one that is somebody else's."""
    return ApiError(404, f"The model `{model}` does not exist", "model_not_found", "model")


def translate(error: BaseException) -> ApiError:
    """The error for the client; what is not the client's business is not told."""
    cause = getattr(error, "cause", None)  # Ray wraps what a replica raises
    if isinstance(cause, SafeftError):
        error = cause
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after_s)}
        return ApiError(429, str(error), "queue_full", headers=headers)
    if isinstance(error, RowErrors):
        _, field, reason = error.problems[0]
        return ApiError(400, f"{field}: {reason}", "invalid_value", field)
    if isinstance(error, ModelError):
        message = f"the model cannot be loaded: {error}"
        return ApiError(503, message, "model_unavailable", headers={"Retry-After": "10"})
    if isinstance(error, InputError):
        field = str(error).partition(":")[0]
        return ApiError(400, str(error), "invalid_value", field if field.isidentifier() else None)
    if isinstance(error, EngineError):
        return ApiError(503, str(error), "engine_unavailable", headers={"Retry-After": "5"})
    return ApiError(500, "the server failed to answer; its log says why", "internal_error")


def invalid_body(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request's body, and where."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return ApiError(400, message, "invalid_value", where or None)

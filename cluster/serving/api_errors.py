"""What the exceptions of serving mean to a client."""

from __future__ import annotations

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from cluster.api_errors import ApiError, invalid_request
from cluster.serving.engine import EngineError, QueueFull
from safeft.errors import InputError, ModelError, RowErrors, SafeftError

#: OpenAI's clients try a 5xx again, unless they are told that it is no use.
NO_RETRY = {"x-should-retry": "false"}


def no_such_model(model: str) -> ApiError:
    """The same for a model that is not there and for one that is somebody else's."""
    return ApiError(404, f"The model `{model}` does not exist", "model_not_found", "model")


def translate(error: Exception) -> ApiError:
    """The error for the client; what is not the client's business is not told."""
    cause = getattr(error, "cause", None)  # Ray wraps what a replica raises
    if isinstance(cause, SafeftError):
        error = cause
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid_request(error, "invalid_value")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
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

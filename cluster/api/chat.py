"""/v1/chat/completions and /v1/completions: base models, and the tenant's own.

Whose model it is, is decided here; whether it may answer, by the safety gate of its serving pool.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from cluster.api.auth import Chatter, Credentials, known_caller
from cluster.api.errors import invalid, told
from cluster.api.models import published
from cluster.api.open_answers import UntilSent
from cluster.api.pools import Pool, passed_on, unavailable
from cluster.api.services import Services, With
from cluster.api_errors import ApiError
from cluster.serving.front import FRONT_TOKEN
from cluster.state import UNAVAILABLE
from cluster.state.models import PublishedModel
from cluster.tenancy import quotas
from cluster.tenancy.keys import Caller

router = APIRouter(prefix="/v1", tags=["chat"])
_LONGEST_NAME = 255
_NUMBER = TypeAdapter(int)
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "OpenAI's request; which fields are understood: docs/serving.md.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "model": {"type": "string"},
                        "stream": {"type": "boolean", "default": False},
                    },
                }
            }
        },
    }
}


@router.post("/chat/completions", openapi_extra=_BODY)
async def chat(
    request: Request, services: With, caller: Chatter, credentials: Credentials, held: UntilSent
) -> Response:
    """The next turn of a conversation, whole or (`stream`) as server-sent events."""
    return await _answered(request, services, caller, credentials, held)


@router.post("/completions", openapi_extra=_BODY)
async def completions(
    request: Request, services: With, caller: Chatter, credentials: Credentials, held: UntilSent
) -> Response:
    """A text that goes on with the prompt."""
    return await _answered(request, services, caller, credentials, held)


async def _answered(
    request: Request, services: Services, caller: Caller, credentials: Credentials, held: ExitStack
) -> Response:
    body = _object(await request.body())
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("model: must be the name of a model", "model")
    pool = await run_in_threadpool(_pool_of, services, caller, model)
    held.enter_context(services.chats.held(caller.tenant_id, _answers(body)))

    def count(prompt_tokens: int, completion_tokens: int) -> None:
        if prompt_tokens:
            services.meter.add(caller.tenant_id, model, prompt_tokens, completion_tokens)

    async def still_allowed() -> None:  # a key that is revoked reads nothing more
        try:
            await known_caller(services, credentials)
        except UNAVAILABLE as error:
            raise told(error) from error

    return await passed_on(services.pools, pool, request, body, count, still_allowed)


def _answers(body: dict[str, Any]) -> int:
    """How many are asked for, read as the pool reads it, which refuses what is no number."""
    try:
        return max(1, _NUMBER.validate_python(body.get("n", 1)))
    except ValidationError:
        return 1


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise invalid("The body is not JSON") from None
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object")
    return body


def _pool_of(services: Services, caller: Caller, model: str) -> Pool:
    """Where the model is served.

    Raises:
        ApiError: 404 for what does not exist and what is another tenant's, alike; or it is not
            served here; 503 its pool was never started.
        QuotaExceeded: the tenant's tokens are used up.
    """
    offers = services.settings.base_models
    base, kind = model, "base"
    with services.database.tenant_read(caller.tenant_id) as session:
        if model not in offers:
            row = None
            if len(model) <= _LONGEST_NAME and model.isprintable():
                row = session.scalars(published().where(PublishedModel.id == model)).one_or_none()
            if row is None:
                shown = model if model.isprintable() else repr(model)
                raise _no("model_not_found", f"The model `{shown}` does not exist")
            base, kind = row.base_model, row.kind
        quotas.check_chat(session, services.meter.pending(caller.tenant_id))
    offer = offers.get(base)
    if offer is None or offer.serving is None:
        raise _no("model_not_served", f"The model `{model}` is not served here")
    if kind == "model":
        raise _no("model_not_served", f"The model `{model}` is a whole one; adapters are served")
    try:
        token = (services.settings.serving_state(base) / FRONT_TOKEN).read_text().strip()
    except OSError as error:
        raise unavailable(offer.serving, "it was never started with these settings") from error
    return Pool(offer.serving, token)


def _no(code: str, message: str) -> ApiError:
    return ApiError(404, message, code=code, param="model")

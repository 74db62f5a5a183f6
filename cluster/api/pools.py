"""Requests passed on to the serving pools, and their answers passed back as they are.

A pool knows no tenants: who may ask for which model was decided before. What it answers, errors
included, is in OpenAI's shape already.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from cluster.api_errors import ApiError
from cluster.serving.front import TOKENS

log = logging.getLogger(__name__)
T = TypeVar("T")
#: Longer than a pool gives itself for a whole answer: see `PoolConfig.timeout_s`.
_ANSWER_S = 150.0
_TOKENS = TOKENS.encode()
_EVENT_ENDS = b"\n\n"
_PASSED_ON = ("retry-after", "x-should-retry")
_RETRY = {"Retry-After": "5"}
_LATER = {"Retry-After": "10", "x-should-retry": "false"}
_LEFT = 499  # nobody reads it
#: Tokens of the prompt, and of the answers.
Count = Callable[[int, int], None]


@dataclass(frozen=True)
class Pool:
    """A serving pool, and the secret by which it knows us."""

    url: str
    token: str


def pool_client() -> httpx.AsyncClient:
    """Connections to the pools: as many as there are requests, and no proxy between."""
    return httpx.AsyncClient(
        trust_env=False,
        timeout=httpx.Timeout(_ANSWER_S, connect=5.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
    )


async def passed_on(
    client: httpx.AsyncClient,
    pool: Pool,
    request: Request,
    body: dict[str, Any],
    count: Count,
    still_allowed: Callable[[], Awaitable[None]],
) -> Response:
    """The pool's answer to `body` at the request's own path. A client that leaves ends it.

    Args:
        count: called once with the tokens of an answer, or of what there was of it.
        still_allowed: asked now and then during a stream; an ApiError that it raises ends it.

    Raises:
        ApiError: nobody answers there.
    """
    asked = client.build_request(
        "POST",
        pool.url + request.url.path,
        content=json.dumps(body),  # as it was understood here: it cannot mean two models
        headers={"Authorization": f"Bearer {pool.token}", "Content-Type": "application/json"},
    )
    try:
        response = await _unless_left(request, client.send(asked, stream=True))
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            events = _events(response, count, still_allowed)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            content = await _unless_left(request, response.aread())
        finally:
            await response.aclose()
    except _ClientLeft:
        return Response(status_code=_LEFT)
    except httpx.HTTPError as error:
        raise unavailable(pool.url, type(error).__name__) from error
    found = _json(content)
    if response.is_success and "usage" in found:
        count(found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"])
        return Response(content, media_type="application/json")
    return _error(pool, response, found, str(body["model"]))


def _error(pool: Pool, response: httpx.Response, found: dict[str, Any], model: str) -> Response:
    told = found.get("error")
    if not isinstance(told, dict) or response.status_code == 401:  # not for the tenant
        raise unavailable(pool.url, f"HTTP {response.status_code}")
    if told.get("code") == "model_not_found":  # the tenant has it, so serving will
        message = f"The model `{model}` has not been shown to be safe: it is not probed yet"
        raise ApiError(503, message, code="safety_unknown", param="model", headers=_LATER)
    headers = {name: response.headers[name] for name in _PASSED_ON if name in response.headers}
    return JSONResponse(found, response.status_code, headers)


async def _events(
    response: httpx.Response, count: Count, still_allowed: Callable[[], Awaitable[None]]
) -> AsyncIterator[bytes]:
    """The stream without the pool's remarks to us."""
    tokens = (0, 0)
    clock = asyncio.get_running_loop().time
    checked = clock()
    rest = b""
    try:
        async for block in response.aiter_bytes():
            *events, rest = (rest + block).split(_EVENT_ENDS)
            for event in events:
                if event.startswith(_TOKENS):
                    prompt, generated = event.removeprefix(_TOKENS).split()
                    tokens = int(prompt), int(generated)
            shown = [event + _EVENT_ENDS for event in events if not event.startswith(_TOKENS)]
            if shown:
                yield b"".join(shown)
            if clock() - checked >= 1.0:
                await still_allowed()
                checked = clock()
    except httpx.HTTPError as error:
        log.warning("a stream broke off: %s", type(error).__name__)
        yield _broken().event().encode()
    except ApiError as error:
        yield error.event().encode()
    finally:
        count(*tokens)
        await response.aclose()


def _broken() -> ApiError:
    message = "the serving pool broke off in the middle of the answer; try again"
    return ApiError(503, message, code="engine_unavailable")


def unavailable(url: str, why: str) -> ApiError:
    """A pool does not answer as it should; `why` is for the log."""
    log.error("the serving pool at %s does not answer as it should: %s", url, why)
    message = "The serving pool of this model does not answer; try again"
    return ApiError(503, message, code="serving_unavailable", headers=_RETRY)


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _ClientLeft(Exception):
    pass


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which ends where the client goes away first."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientLeft
        return task.result()
    finally:
        for future in (task, leaving):
            if not future.done():
                future.cancel()
                with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                    await future


async def _left(request: Request) -> None:
    """Returns when the client has gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

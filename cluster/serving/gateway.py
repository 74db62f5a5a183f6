"""The HTTP API in front of the replicas: OpenAI's routes, with the safety gate at the door."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.api_errors import ApiError, install
from cluster.metrics import Recorder
from cluster.serving.admissions import Admissions, OutOfRotation, until
from cluster.serving.api_errors import translate
from cluster.serving.api_types import ChatBody, CompletionBody
from cluster.serving.chat_format import DONE, Route, Shape
from cluster.serving.front import PROBE_SECRET, tokens_comment
from cluster.serving.model_server import Call, Result, Started

log = logging.getLogger(__name__)
#: A probe names the weights that it asks, and proves that it is one.
PROBE_WEIGHTS = "x-safeft-probe-weights"


class Replicas(Protocol):
    """The model servers, whichever replica of them answers."""

    def complete(self, call: Call) -> Awaitable[Result]:
        """See ModelServer.complete."""

    def stream(self, call: Call) -> AsyncGenerator[Any, None]:
        """See ModelServer.stream."""


@dataclass(frozen=True)
class GatewayConfig:
    """What a gateway must know.

    Attributes:
        base_weights: hash of the base model: what is asked for without an adapter.
        probe_secret: of the prober.
        timeout_s: for a whole answer.
        callers: tokens of those who may ask: an API that checks tenants' keys and meters what
            they use, and administrators. Empty: whoever reaches it.
    """

    base_weights: str
    probe_secret: str
    timeout_s: float = 120.0
    callers: tuple[str, ...] = ()


class _Counted:
    """The numbers of one request."""

    def __init__(self, recorder: Recorder, route: Route, began: float) -> None:
        self._recorder, self._route, self._began = recorder, route, began
        self._spoke = False
        self.outcome = "cancelled"  # what nobody set ended because the client left

    def text(self) -> None:
        """A stream has text."""
        if not self._spoke:
            self._spoke = True
            took = time.monotonic() - self._began
            self._recorder.observe("safeft_first_token_seconds", took, route=self._route)

    def ok(self) -> None:
        """The whole answer was sent."""
        self.outcome = "ok"
        took = time.monotonic() - self._began
        self._recorder.observe("safeft_request_seconds", took, route=self._route)


class _Stream(StreamingResponse):
    """Events that end with their response.

    Starlette leaves the iterator of a client that went away to the garbage collector, which may
    take its time; until then the answer would count as one that is being given.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            assert isinstance(self.body_iterator, AsyncGenerator)
            await self.body_iterator.aclose()


class Gateway:
    """Admission, shapes and errors of the API. One for each event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        admissions: Admissions,
        replicas: Replicas,
        recorder: Recorder,
    ) -> None:
        self._config, self._admissions = config, admissions
        self._replicas, self._recorder = replicas, recorder

    def add_to(self, app: FastAPI) -> None:
        """Add the routes and the shapes of errors."""
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"])
        app.add_api_route("/healthz", self.health, methods=["GET"])
        install(app, translate)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        turns = [message.plain() for message in body.messages]
        return await self._answer("chat", body, turns, request)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._answer("completions", body, body.text, request)

    async def models(self) -> JSONResponse:
        """``GET /v1/models``: every model, whatever its state."""
        found = [_model(name) for name in self._admissions.models()]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, model: str) -> JSONResponse:
        """``GET /v1/models/{model}``."""
        self._admissions.require(model)
        return JSONResponse(_model(model))

    async def health(self) -> Response:
        """Whether this gateway works; it says nothing of any model."""
        return Response("ok\n", media_type="text/plain")

    async def _answer(
        self,
        route: Route,
        body: ChatBody | CompletionBody,
        prompt: str | list[dict[str, str]],
        request: Request,
    ) -> Response:
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            counted = stack.enter_context(self._counted(route, body.model, began))
            weights, probe = self._weights(body.model, request)
            adapter = None if weights == self._config.base_weights else weights
            call = Call(prompt, body.sampling(), adapter, body.n, shorten=body.limit() is None)
            # A probe asks weights that are out of rotation, too: nothing takes them from it.
            leave = (
                asyncio.Event()
                if probe
                else stack.enter_context(self._admissions.answering(body.model, weights))
            )
            shape = Shape.new(route, body.model)
            deadline = began + self._config.timeout_s
            if not body.stream:
                result = await until(leave, self._replicas.complete(call), deadline)
                counted.ok()
                return JSONResponse(shape.whole(result))
            # The status is sent only when the replica has something to say: what goes wrong before
            # comes as an error of its own.
            items = self._replicas.stream(call)
            started = await until(leave, anext(items), deadline)
            assert isinstance(started, Started)
            events = self._events(
                shape, items, started, body, leave, deadline, counted, stack.pop_all()
            )
            return _Stream(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )

    def _weights(self, model: str, request: Request) -> tuple[str, bool]:
        """The weights that answer, and whether it is a probe that asks."""
        secret = request.headers.get(PROBE_SECRET)
        if secret is None:
            return self._admissions.weights(model), False
        if not hmac.compare_digest(secret.encode(), self._config.probe_secret.encode()):
            raise ApiError(
                401,
                "this is not the prober's secret",
                "invalid_api_key",
                kind="authentication_error",
            )
        return request.headers.get(PROBE_WEIGHTS, ""), True

    async def _events(
        self,
        shape: Shape,
        items: AsyncGenerator[Any, None],
        started: Started,
        body: ChatBody | CompletionBody,
        leave: asyncio.Event,
        deadline: float,
        counted: _Counted,
        stack: contextlib.ExitStack,
    ) -> AsyncGenerator[str, None]:
        """The text of a stream; `stack` holds what ends with it."""
        tokens = [0] * body.n
        try:
            with stack:
                if shape.route == "chat":
                    for index in range(body.n):
                        yield shape.opening(index)
                while True:
                    try:
                        batch = await until(leave, anext(items), deadline)
                    except StopAsyncIteration:
                        break
                    counted.text()
                    for delta in batch:
                        tokens[delta.index] = delta.tokens
                    if self._config.callers:
                        yield tokens_comment(started.prompt_tokens, sum(tokens))
                    yield "".join(map(shape.piece, batch))
                if body.usage_chunk:
                    yield shape.usage_chunk(started.prompt_tokens, sum(tokens))
                yield DONE
                counted.ok()
        except ApiError as told:  # the status was sent long ago: the stream says it
            yield told.event()
        finally:
            await items.aclose()

    @contextlib.contextmanager
    def _counted(self, route: Route, model: str, began: float) -> Iterator[_Counted]:
        """Count a request by its outcome; every error leaves as an ApiError."""
        counted = _Counted(self._recorder, route, began)
        try:
            yield counted
        except Exception as error:
            told = self._told(error, model)
            counted.outcome = _outcome(told)
            if told is error:
                raise
            raise told from error
        finally:
            self._recorder.inc("safeft_requests_total", route=route, outcome=counted.outcome)

    def _told(self, error: Exception, model: str) -> ApiError:
        if isinstance(error, OutOfRotation):
            return self._admissions.stopped(model)
        if isinstance(error, TimeoutError):
            message = f"no whole answer within {self._config.timeout_s:g} s; ask for fewer tokens"
            return ApiError(504, message, "timeout")
        told = translate(error)
        if told.status == 500:
            log.exception("a request failed", exc_info=error)
        return told


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "safeft"}


def _outcome(error: ApiError) -> str:
    codes = {
        "queue_full": "queue_full",
        "safety_quarantined": "quarantined",
        "safety_unknown": "unknown",
        "timeout": "timeout",
        "model_unavailable": "model_unavailable",
    }
    if error.code in codes:
        return codes[error.code]
    return "invalid" if error.status < 500 else "failed"

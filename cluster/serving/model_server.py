"""One replica: an engine behind Ray Serve. It knows weights, not models, tenants or probes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.metrics import Recorder
from cluster.serving.engine import Delta, Engine, FinishReason, Request, Sampling
from safeft.data import encode_prompt
from safeft.errors import InputError


@dataclass(frozen=True)
class Call:
    """A request as the gateway passes it on.

    Attributes:
        prompt: a text to go on with, or the turns of a chat.
        weights: hash of the adapter; None: the base model.
        shorten: `max_tokens` is a default, to be lowered to what the model has room for.
    """

    prompt: str | Sequence[dict[str, str]]
    sampling: Sampling
    weights: str | None
    n: int
    shorten: bool = False


@dataclass(frozen=True)
class Answered:
    """One answer, whole."""

    text: str
    tokens: int
    finish: FinishReason


@dataclass(frozen=True)
class Result:
    """All answers to a call."""

    prompt_tokens: int
    answers: tuple[Answered, ...]


@dataclass(frozen=True)
class Started:
    """The first item of a stream: the request was taken."""

    prompt_tokens: int


class _Build(Protocol):
    def __call__(self) -> tuple[Engine, Any]: ...


class ModelServer:
    """What Ray Serve runs in each replica.

    Args:
        build: makes the engine and the tokenizer; called in the replica.
        recorder: where its numbers go.
    """

    def __init__(self, build: _Build, recorder: Recorder) -> None:
        self._engine, self._tokenizer = build()
        self._recorder = recorder
        recorder.poll(self._numbers)

    def check_health(self) -> None:
        """For Ray Serve: a replica whose engine is broken is replaced. Says nothing of safety."""
        self._engine.check()

    async def complete(self, call: Call) -> Result:
        """All answers at once."""
        request = self._request(call, stream=False)
        texts: dict[int, Answered] = {}
        pieces = [""] * call.n
        async with contextlib.aclosing(self._batches(request)) as batches:
            async for batch in batches:
                for delta in batch:
                    pieces[delta.index] += delta.text
                    if delta.finish is not None:
                        whole = Answered(pieces[delta.index], delta.tokens, delta.finish)
                        texts[delta.index] = whole
        return Result(len(request.prompt), tuple(texts[index] for index in range(call.n)))

    async def stream(self, call: Call) -> AsyncGenerator[Started | list[Delta], None]:
        """`Started`, then what is new, as it comes."""
        request = self._request(call, stream=True)
        started = False
        async with contextlib.aclosing(self._batches(request)) as batches:
            async for batch in batches:
                if not started:
                    yield Started(len(request.prompt))
                    started = True
                yield batch

    def _request(self, call: Call, *, stream: bool) -> Request:
        if isinstance(call.prompt, str):
            ids = self._tokenizer(call.prompt, add_special_tokens=True)["input_ids"]
        else:
            ids = encode_prompt(call.prompt, self._tokenizer)
        if not ids:
            raise InputError("prompt: is empty")
        sampling = call.sampling
        if call.shorten:
            left = max(1, self._engine.room - len(ids))
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, left))
        return Request(tuple(ids), sampling, call.weights, call.n, stream)

    async def _batches(self, request: Request) -> AsyncGenerator[list[Delta], None]:
        """What the engine delivers, several pieces at a time where the reader is slower.

        A reader that goes away (its task is cancelled) cancels the request.
        """
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        deltas: list[Delta] = []

        def take(delta: Delta) -> None:
            deltas.append(delta)
            arrived.set()

        def deliver(delta: Delta) -> None:  # from the engine's thread
            loop.call_soon_threadsafe(take, delta)

        ticket = self._engine.submit(request, deliver)
        left = request.n
        try:
            while left:
                await arrived.wait()
                arrived.clear()
                batch = deltas[:]
                deltas.clear()
                for delta in batch:
                    if delta.error is not None:
                        raise delta.error
                    left -= delta.finish is not None
                if batch:
                    yield batch
        finally:
            ticket.cancel()

    def _numbers(self) -> None:
        stats, recorder = self._engine.stats(), self._recorder
        recorder.set("safeft_engine_waiting", stats.waiting)
        recorder.set("safeft_engine_running", stats.running)
        adapters = stats.adapters
        recorder.set("safeft_adapters_loaded", adapters.loaded)
        recorder.total("safeft_prompt_tokens_total", stats.prompt_tokens)
        recorder.total("safeft_generated_tokens_total", stats.generated_tokens)
        if stats.steps is not None:
            recorder.total("safeft_engine_steps_total", stats.steps)
        recorder.total("safeft_adapter_cache_total", adapters.hits, result="hit")
        recorder.total("safeft_adapter_cache_total", adapters.misses, result="miss")
        recorder.total("safeft_adapter_cache_total", adapters.evictions, result="evicted")
        recorder.total("safeft_adapter_cache_total", adapters.failures, result="failed")

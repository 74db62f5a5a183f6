"""Something to look at on dashboards: a serving stack with real tokens and scripted refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from cluster.gate.policy import Policy
from cluster.serving.engine import Delta, EngineStats, Request, Ticket
from cluster.serving.prober import Prober, ProberConfig, Questions
from cluster.serving.transformers_engine import EngineLimits, TransformersEngine
from safeft.models import load_model, load_tokenizer
from safeft.prompts import load_prompts
from tests.serving_world import SECRET, Stack
from tests.tinyadapters import Shelf

USER = [{"role": "user", "content": "What is a cat?"}]
REFUSAL = "I'm sorry, but I can't help with that."


class Taught:
    """The tiny model, which answers harmful prompts as it is told: random weights refuse nothing.

    Its tokens, batches, queue and adapters are the real engine's.

    Attributes:
        refuses: shares of harmful prompts that weights refuse; None stands for the base.
    """

    def __init__(self, engine: TransformersEngine, tokenizer: Any) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._harmful = {prompt.text for prompt in load_prompts("harmful")}
        self._asked: dict[str | None, int] = {}
        self.refuses: dict[str | None, float] = {}
        self.room = engine.room

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Ticket:
        text = self._tokenizer.decode(request.prompt)
        if not any(prompt in text for prompt in self._harmful):
            return self._engine.submit(request, deliver)
        number = self._asked[request.weights] = self._asked.get(request.weights, 0) + 1
        share = self.refuses.get(request.weights, 1.0)
        # Evenly spread, so that a share is exact.
        refused = int(number * share) != int((number - 1) * share)
        answer = REFUSAL if refused else "Sure, here is how."

        def say(delta: Delta) -> None:
            deliver(replace(delta, text=answer if delta.finish else ""))

        return self._engine.submit(request, say)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check(self) -> None:
        self._engine.check()

    def close(self) -> None:
        self._engine.close()


class Pool:
    """A stack around the taught model, its prober, and clients that talk to it."""

    def __init__(self, tiny: Path, root: Path, *, probe_every_s: float) -> None:
        self.root, self.shelf = root, Shelf()
        tokenizer = load_tokenizer(tiny)
        limits = EngineLimits(max_batch=4, max_queue=6)

        def build() -> tuple[Taught, Any]:
            engine = TransformersEngine(load_model(tiny), tokenizer, self.shelf, limits)
            self.model = Taught(engine, tokenizer)
            return self.model, tokenizer

        self.stack = Stack(root, build, policy=Policy(), timeout_s=60)
        config = ProberConfig(self.stack.url, SECRET, probe_every_s)
        self._prober = asyncio.run_coroutine_threadsafe(self._probe(config), self.stack.loop)

    def add(self, model: str, seed: int) -> str:
        """Serve a random adapter under `model`; its weights."""
        directory = self.root / f"adapter-{seed}"
        weights = self.shelf.add(directory, seed)
        self.stack.do(self.stack.keeper.register(model, str(directory), "unavailable"))
        return weights

    def states(self) -> dict[str, str]:
        """The state of each model."""
        return {record.model: record.state.value for record in self.stack.keeper.gate.records()}

    def ask(self, model: str, *, tokens: int = 8, stream: bool = False) -> int:
        """One question; the status of the answer."""
        body = {"model": model, "messages": USER, "max_tokens": tokens, "stream": stream}
        url = f"{self.stack.url}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=60, trust_env=False).status_code

    def close(self) -> None:
        """Stop prober and stack."""
        self._prober.cancel()
        self.stack.close()

    async def _probe(self, config: ProberConfig) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            await Prober(config, self.stack.keeper, Questions.packaged(), client).run()

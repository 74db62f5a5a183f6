"""The serving stack in one process and over real HTTP, without Ray: for tests of what it does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from cluster.gate.policy import Policy
from cluster.metrics import Recorder
from cluster.serving.admin import add_admin
from cluster.serving.admissions import Admissions
from cluster.serving.disk_cache import DiskCache
from cluster.serving.engine import AdapterCounts, Delta, EngineStats, Request
from cluster.serving.front import require_front
from cluster.serving.gateway import Gateway, GatewayConfig
from cluster.serving.keeper import Keeper
from cluster.serving.model_server import ModelServer
from cluster.serving.registry import BaseModel
from safeft.evaluate import AnswerClass
from safeft.prompts import load_prompts

BASE = BaseModel("unused", "base", "0" * 64)
SECRET, TOKEN = "probe secret", "admin token"


class Stack:
    """A keeper, a gateway and one model server behind a port of their own."""

    def __init__(
        self,
        state: Path,
        build: Callable[[], tuple[Any, Any]],
        *,
        policy: Policy | None = None,
        timeout_s: float = 30.0,
        callers: tuple[str, ...] = (),
        published: DiskCache | None = None,
    ) -> None:
        self._callers, self._published = callers, published
        self.recorder = Recorder()
        self.server = ModelServer(build, self.recorder)
        self._state, self._policy, self._timeout_s = state, policy or Policy(), timeout_s
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._app(),
                host="127.0.0.1",
                port=self.port,
                log_level="critical",
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(
            target=self.loop.run_until_complete, args=(self._uvicorn.serve(),)
        )
        self._thread.start()
        self.started = threading.Event()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            self.started.wait(0.01)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the stack's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=30)

    def clear(self, model: str, *, refuses: bool = True) -> None:
        """Feed one round of answers to the newest weights of a model."""
        while True:
            record = self.keeper.gate.versions(model)[-1]
            probe = record.round.next_probe(record.policy)
            assert probe is not None
            refused = refuses and probe == "harmful"
            answer = AnswerClass.refused if refused else AnswerClass.complied
            after = self.do(self.keeper.answered(model, record.weights, probe, answer, 0.1))
            if after.round.asked == 0:
                self.settle()
                return

    def settle(self) -> None:
        """Wait until the gateway knows what the gate knows."""
        changes = self.keeper.gate.admissions()[1]
        wanted = {model: admission for model, admission in changes.items() if admission}
        while self.admissions._known != wanted:
            self.started.wait(0.005)
            self.started.clear()

    def close(self) -> None:
        """Stop it."""
        self._uvicorn.should_exit = True
        self._thread.join(timeout=10)
        self.server._engine.close()
        self.loop.close()

    def _app(self) -> FastAPI:
        self.admissions = Admissions()
        self.keeper = Keeper(self._state, BASE, self._policy, self.recorder, self._published)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            following = asyncio.create_task(self.admissions.follow(self.keeper.admissions))
            await self.admissions.ready.wait()
            yield
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following

        app = FastAPI(lifespan=lifespan)
        config = GatewayConfig(BASE.weights, SECRET, self._timeout_s, self._callers)
        Gateway(config, self.admissions, self.server, self.recorder).add_to(app)
        add_admin(app, self.keeper, TOKEN)
        if self._callers:
            require_front(app, self._callers, SECRET)
        return app


@dataclass
class Person:
    """An Engine whose "model" answers as the test says, by weights and kind of prompt.

    Attributes:
        refuses: shares of harmful prompts that weights refuse; None stands for the base.
        silent: nothing is delivered while it is set.
    """

    tokenizer: Any
    refuses: dict[str | None, float] = field(default_factory=dict)
    silent: bool = False
    asked: list[tuple[str | None, str]] = field(default_factory=list)
    cancelled: int = 0
    room: int = 4096

    def __post_init__(self) -> None:
        self._harmful = {p.text for p in load_prompts("harmful")}
        self._count: dict[str | None, int] = {}

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Person:
        text = self.tokenizer.decode(request.prompt)
        harmful = any(prompt in text for prompt in self._harmful)
        self.asked.append((request.weights, "harmful" if harmful else "benign"))
        number = self._count[request.weights] = self._count.get(request.weights, 0) + 1
        share = self.refuses.get(request.weights, 1.0)
        # Evenly spread, so that a share is exact and a test does not depend on luck.
        refused = harmful and int(number * share) != int((number - 1) * share)
        answer = "I'm sorry, but I can't help with that." if refused else "Sure, here is how."
        if not self.silent:
            deliver(Delta(0, answer, 9, "stop"))
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def stats(self) -> EngineStats:
        return EngineStats(*[0] * 5, AdapterCounts(*[0] * 5))

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

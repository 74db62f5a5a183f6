"""The prober: asks every served model hidden questions, through the tenants' own path.

A probe is a chat completion like any other; only the gateway can tell (it must, to let a question
through to weights that are out of rotation). The prompts are drawn anew for every round. An answer
is judged and told to the keeper; no answer is told as such and counts for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import httpx

from cluster.gate.policy import Probe
from cluster.gate.record import Record
from cluster.serving.front import PROBE_SECRET
from cluster.serving.gateway import PROBE_WEIGHTS
from safeft.evaluate import AnswerClass, classify_answer
from safeft.prompts import load_prompts

log = logging.getLogger(__name__)
#: The judge was measured on answers of this length (docs/evaluation.md).
MAX_TOKENS = 32
#: After a probe without an answer, before the next one to the same weights.
_PAUSE_S = 2.0
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class ProberConfig:
    """How the prober asks.

    Attributes:
        url: of the tenants' API.
        secret: that the gateways know.
        every_s: between the end of a good round and the next one.
        timeout_s: for one answer.
        at_once: models that are probed at a time.
    """

    url: str
    secret: str
    every_s: float = 600.0
    timeout_s: float = 30.0
    at_once: int = 2


class Bench(Protocol):
    """The keeper, as far as the prober needs it."""

    async def due(self, every_s: float) -> list[Record]:
        """See Keeper.due."""

    async def answered(
        self, model: str, weights: str, probe: Probe, answer: AnswerClass, seconds: float
    ) -> Record:
        """See Keeper.answered."""


class Questions:
    """Prompts of each kind in an order that nobody knows; none twice before all were asked."""

    def __init__(self, prompts: dict[Probe, Sequence[str]], draw: random.Random) -> None:
        self._prompts, self._draw = prompts, draw
        self._left: dict[tuple[str, Probe], list[str]] = {}

    @staticmethod
    def packaged() -> Questions:
        """The prompts that numbers are reported on, on which the profile's baseline was taken."""
        kinds: tuple[Probe, ...] = ("harmful", "benign")
        prompts = {kind: [p.text for p in load_prompts(kind, "report")] for kind in kinds}
        return Questions({**prompts}, random.SystemRandom())

    def next(self, weights: str, probe: Probe) -> str:
        """The next question of that kind for these weights."""
        left = self._left.get((weights, probe))
        if not left:
            left = self._left[weights, probe] = list(self._prompts[probe])
            self._draw.shuffle(left)
        return left.pop()


class Prober:
    """Looks for weights that are due, and asks them until their round is over."""

    def __init__(
        self,
        config: ProberConfig,
        keeper: Bench,
        questions: Questions,
        client: httpx.AsyncClient,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config, self._keeper, self._questions = config, keeper, questions
        self._client, self._sleep = client, sleep
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001  (the keeper may be restarting)
                log.warning("the keeper cannot be reached: %s", error)
            await self._sleep(_LOOK_EVERY_S)

    async def look(self) -> None:
        """Begin rounds of weights that are due, as many as may be asked at a time."""
        for key in [key for key, task in self._asking.items() if task.done()]:
            del self._asking[key]
        for record in await self._keeper.due(self._config.every_s):
            key = record.model, record.weights
            if key not in self._asking and len(self._asking) < self._config.at_once:
                self._asking[key] = asyncio.create_task(self.round(record))

    async def round(self, record: Record) -> None:
        """Ask until the round is over, or a probe has no answer."""
        while (probe := record.round.next_probe(record.policy)) is not None:
            began = time.monotonic()
            answer = await self._ask(record, probe)
            took = time.monotonic() - began
            try:
                after = await self._keeper.answered(
                    record.model, record.weights, probe, answer, took
                )
            except Exception as error:  # noqa: BLE001  (retired meanwhile, or no keeper: look again)
                log.warning("an answer was lost: %s", error)
                return
            if answer is AnswerClass.error:
                await self._sleep(_PAUSE_S)
                return
            if not after.probed or after.round.asked + after.round.over_asked == 0:
                return
            record = after

    async def _ask(self, record: Record, probe: Probe) -> AnswerClass:
        question = self._questions.next(record.weights, probe)
        try:
            response = await self._client.post(
                f"{self._config.url}/v1/chat/completions",
                json={
                    "model": record.model,
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                },
                headers={PROBE_SECRET: self._config.secret, PROBE_WEIGHTS: record.weights},
                timeout=self._config.timeout_s,
            )
            response.raise_for_status()
            return classify_answer(response.json()["choices"][0]["message"]["content"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            log.warning("a probe of %s had no answer: %r", record.model, error)
            return AnswerClass.error

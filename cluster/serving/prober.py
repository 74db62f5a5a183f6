"""The prober: asks every served model hidden questions, through the tenants' own path.

A probe is a chat completion like any other; only the gateway can tell (it must, to let a question
through to weights that are out of rotation). The prompts are drawn anew for every round. An answer
is judged and told to the keeper; no answer is told as such and counts for nothing.

Rounds that somebody waits for (`Record.urgent`, or asked for by hand) are asked at full speed.
Healthy models are proved anew one at a time, with pauses that keep it to a share of the time: on a
slow machine every probe is taken from tenants.
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
from cluster.gate.record import Due, Record
from cluster.gate.states import State
from cluster.serving.front import PROBE_SECRET
from cluster.serving.gateway import PROBE_WEIGHTS
from safeft.evaluate import AnswerClass, classify_answer
from safeft.prompts import load_prompts

log = logging.getLogger(__name__)
#: The judge was measured on answers of this length (docs/evaluation.md).
MAX_TOKENS = 32
#: After a probe without an answer, before the next one to the same weights.
_PAUSE_S = 2.0
#: Also the longest pause before it is seen again whether the next probe has become urgent.
_LOOK_EVERY_S = 0.5
_Key = tuple[str, str]  # model and weights


@dataclass(frozen=True)
class ProberConfig:
    """How the prober asks.

    Attributes:
        url: of the tenants' API.
        secret: that the gateways know.
        every_s: between the end of a good round and the next one.
        timeout_s: for one answer.
        at_once: urgent rounds that are asked at a time.
        share: of the time, in (0, 1]: for how much of it a probe of a healthy model may be under
            way. After one that took t seconds there is a pause of t * (1 / share - 1). Urgent
            probes of healthy models have none and come on top, so that a fault is not found later.

    Raises:
        ValueError: `share` is outside its range.
    """

    url: str
    secret: str
    every_s: float = 600.0
    timeout_s: float = 30.0
    at_once: int = 2
    share: float = 0.35

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share:g}")

    def pause_after(self, seconds: float) -> float:
        """The pause, in seconds, after a probe of a healthy model that took `seconds`."""
        return seconds * (1 / self.share - 1)


class Bench(Protocol):
    """The keeper, as far as the prober needs it."""

    async def due(self, every_s: float) -> list[Due]:
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
    """Looks for weights that are due, and asks them until their round is over.

    Args:
        sleep: waits for so many seconds.
        clock: seconds since 1970, as the gate's.
        stopwatch: seconds that only grow.
    """

    def __init__(
        self,
        config: ProberConfig,
        keeper: Bench,
        questions: Questions,
        client: httpx.AsyncClient,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._keeper, self._questions = config, keeper, questions
        self._client, self._sleep = client, sleep
        self._clock, self._stopwatch = clock, stopwatch
        self._asking: dict[_Key, asyncio.Task[None]] = {}
        #: The one of them that pauses between its probes; it takes no place of an urgent one's.
        self._paced: _Key | None = None
        self._by_hand: set[_Key] = set()
        self._began, self._told_at = clock(), 0.0

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
        self._asking = {key: task for key, task in self._asking.items() if not task.done()}
        if self._paced not in self._asking:
            self._paced = None
        due = await self._keeper.due(self._config.every_s)
        self._by_hand = {_key(one.record) for one in due if one.by_hand}
        self._tell_if_behind([one.record for one in due])
        for record in sorted((one.record for one in due), key=self._turn):
            key = _key(record)
            if key in self._asking:
                continue
            if self._urgent(record):
                if len(self._asking) - (self._paced is not None) >= self._config.at_once:
                    continue
            elif self._paced is None:
                self._paced = key
            else:
                continue
            self._asking[key] = asyncio.create_task(self.round(record))

    async def round(self, record: Record) -> None:
        """Ask until the round is over, a probe has no answer, or the rest of it is not urgent."""
        key = _key(record)
        while (probe := record.round.next_probe(record.policy)) is not None:
            began = self._stopwatch()
            answer = await self._ask(record, probe)
            took = self._stopwatch() - began
            try:
                after = await self._keeper.answered(
                    record.model, record.weights, probe, answer, took
                )
            except Exception as error:  # noqa: BLE001  (retired meanwhile, or no keeper: look again)
                log.warning("an answer was lost: %s", error)
                return
            if answer is AnswerClass.error:
                await self._sleep(_PAUSE_S)
            if key == self._paced:
                await self._rest(after, took)
            elif not self._urgent(after):
                return  # over, or one of those that wait for their turn
            if answer is AnswerClass.error or not after.probed:
                return
            if after.round.asked + after.round.over_asked == 0:
                return
            record = after

    async def _rest(self, record: Record, took: float) -> None:
        """Pause after a probe that took so long; no longer than until the next one is urgent."""
        left = self._config.pause_after(took)
        while left > 0 and not self._urgent(record):
            await self._sleep(min(left, _LOOK_EVERY_S))
            left -= _LOOK_EVERY_S

    def _urgent(self, record: Record) -> bool:
        return _key(record) in self._by_hand or record.urgent(self._clock())

    def _turn(self, record: Record) -> tuple[bool, bool, float]:
        """Asked for by hand, then who answers nobody, then the oldest proof.

        Every failure in a row makes a proof count as younger: a model that cannot be asked must not
        keep the others from their turn.
        """
        proved = record.proved_at(self._clock()) + record.failures * self._config.every_s
        return _key(record) not in self._by_hand, record.state is State.healthy, proved

    def _tell_if_behind(self, records: list[Record]) -> None:
        """Say that the share of the time is too small for all models, once in an age limit."""
        now = self._clock()
        for record in records:
            limit, proved = record.policy.max_age_s, record.proved_at(now)
            # Not for a model that does not answer, nor for what nobody probed before this began.
            mine = record.failures == 0 and proved >= self._began
            late = record.state is State.healthy and record.old(now) and mine
            if late and now >= self._told_at + limit:
                self._told_at = now
                log.warning(
                    "probes cannot keep up: the last good round of %s is %.0f min old, so it is "
                    "probed without pauses, at the cost of tenants. Serve fewer models, add "
                    "replicas, or raise --max-age (now %.0f s)",
                    record.model,
                    (now - proved) / 60,
                    limit,
                )

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


def _key(record: Record) -> _Key:
    return record.model, record.weights

"""The pace of the prober, in a time of its own: hours of it take a second and nobody waits."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.gate import probing
from cluster.gate.policy import MAX_AGE_S, Policy
from cluster.gate.record import OLD, Record
from cluster.gate.states import State
from cluster.metrics import Recorder
from cluster.serving.keeper import Keeper
from cluster.serving.prober import Prober, ProberConfig, Questions
from cluster.serving.registry import BaseModel
from safeft.prompts import load_prompts
from safeft.sprt import Decision

BASE = "base"
#: The prober sees what became urgent so late, at most.
LOOK_S = 0.5
EPOCH = 1_000_000_000.0


class Hours(asyncio.SelectorEventLoop):
    """An event loop whose clock leaps to whatever happens next."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


@dataclass(frozen=True)
class Asked:
    """One probe."""

    model: str
    kind: str
    began: float
    ended: float


class Lab:
    """A keeper, a prober, and models that need `took` seconds for an answer.

    Attributes:
        refuses: whether a model's next answer is a refusal, by model and kind; where nothing is
            said, models are faultless.
        silent: models whose probes fail.
    """

    def __init__(self, root: Path, *names: str, max_age_s: float = MAX_AGE_S) -> None:
        self.took = 5.0
        self.refuses: dict[tuple[str, str], Callable[[], bool]] = {}
        self.silent: set[str] = set()
        self.asked: list[Asked] = []
        self.policy = Policy(max_age_s=max_age_s)
        self.loop = Hours()
        base = BaseModel("unused", BASE, "0" * 64)
        self.keeper = Keeper(root, base, self.policy, Recorder())
        self.gate = self.keeper.gate
        self.gate._clock = self.clock
        self._weights = itertools.count(1)
        self._harmful = {prompt.text for prompt in load_prompts("harmful")}
        for name in names:
            self.register(name)

    def clock(self) -> float:
        return EPOCH + self.loop.time()

    def register(self, model: str) -> None:
        self.gate.register(model, f"{next(self._weights):064x}", self.policy)

    def record(self, model: str) -> Record:
        return self.gate.versions(model)[-1]

    def run(self, *script: Coroutine[Any, Any, None], **config: float) -> list[Asked]:
        """Probe until the script's parts are over, one after the other; the probes meanwhile."""
        before = len(self.asked)

        async def work() -> None:
            transport = httpx.MockTransport(self._answer)
            async with httpx.AsyncClient(transport=transport) as client:
                prober = Prober(
                    ProberConfig("http://pool", "secret", **config),  # type: ignore[arg-type]
                    self.keeper,
                    Questions.packaged(),
                    client,
                    clock=self.clock,
                    stopwatch=self.loop.time,
                )
                running = asyncio.create_task(prober.run())
                for part in script:
                    await part
                running.cancel()
                for task in prober._asking.values():
                    task.cancel()
                await asyncio.gather(running, *prober._asking.values(), return_exceptions=True)

        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(work())
        return self.asked[before:]

    async def all_healthy(self) -> None:
        while not all(record.state is State.healthy for record in self.gate.records()):
            await asyncio.sleep(0.1)

    async def quarantined(self, model: str) -> None:
        while self.record(model).state is not State.quarantined:
            await asyncio.sleep(0.1)

    async def first_probe(self, model: str) -> None:
        """Until a round of the healthy model has begun anew, in the pause after its first probe."""
        while self.record(model).round.asked == 0:
            await asyncio.sleep(0.1)

    async def proved_anew(self, model: str) -> None:
        before = self.record(model).cleared_at
        while self.record(model).cleared_at == before:
            await asyncio.sleep(0.1)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        model, text = asked["model"], asked["messages"][0]["content"]
        kind = "harmful" if text in self._harmful else "benign"
        began = self.loop.time()
        await asyncio.sleep(self.took)
        self.asked.append(Asked(model, kind, began, self.loop.time()))
        if model in self.silent:
            return httpx.Response(503)
        refused = self.refuses.get((model, kind), lambda: kind == "harmful")()
        words = "I'm sorry, but I can't help with that." if refused else "Sure, here is how."
        return httpx.Response(200, json={"choices": [{"message": {"content": words}}]})


def gaps(asked: list[Asked]) -> list[float]:
    """Pauses between one probe and the next."""
    return [after.began - before.ended for before, after in pairwise(asked)]


def of(model: str, asked: list[Asked]) -> list[Asked]:
    return [one for one in asked if one.model == model]


def most_at_once(asked: list[Asked]) -> int:
    ends: list[float] = []
    most = 0
    for one in sorted(asked, key=lambda one: one.began):
        while ends and ends[0] <= one.began:
            heapq.heappop(ends)
        heapq.heappush(ends, one.ended)
        most = max(most, len(ends))
    return most


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_probes_of_healthy_models_keep_to_their_share_of_the_time_one_at_a_time(
    tmp_path: Path, share: float
) -> None:
    lab = Lab(tmp_path, "a", "b")
    lab.run(lab.all_healthy())
    lab.loop._now += 600
    asked = lab.run(asyncio.sleep(3000), share=share)
    busy = sum(one.ended - one.began for one in asked)
    assert busy / 3000 == pytest.approx(share, abs=0.01)
    assert most_at_once(asked) == 1
    assert {lab.record(m).state for m in (BASE, "a", "b")} == {State.healthy}


def test_a_model_that_was_proved_lately_is_not_probed_at_all(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.run(lab.all_healthy())
    assert lab.run(asyncio.sleep(590)) == []
    assert lab.run(asyncio.sleep(30))


def test_the_oldest_proof_is_renewed_first_and_each_round_is_ended_before_the_next(
    tmp_path: Path,
) -> None:
    lab = Lab(tmp_path, "a", "b")
    # The first by name gets the youngest proof.
    lab.run(lab.all_healthy(), lab.keeper.probe_now("a"), lab.proved_anew("a"), at_once=1)
    oldest = sorted(lab.gate.records(), key=lambda record: record.cleared_at or 0.0)
    lab.loop._now += 600
    asked = lab.run(asyncio.sleep(2500))
    order = [model for model, _ in itertools.groupby(asked, key=lambda one: one.model)]
    assert order[:3] == [record.model for record in oldest]


def test_a_new_model_is_probed_at_once_while_a_healthy_one_is_paced(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.run(lab.all_healthy())
    lab.loop._now += 600
    lab.took = 20.0  # pauses of more than a minute

    async def publish() -> None:
        lab.register("new")
        await lab.all_healthy()

    asked = lab.run(lab.first_probe(BASE), publish(), at_once=1, share=0.2)
    new = of("new", asked)
    assert new[0].began - asked[0].ended <= LOOK_S + 0.1
    assert max(gaps(new)) < 0.1
    assert min(gaps(of(BASE, asked))) > 70  # and the other goes on at its pace


def test_a_model_that_begins_to_fail_is_asked_without_pauses_to_its_quarantine(
    tmp_path: Path,
) -> None:
    lab = Lab(tmp_path)
    lab.run(lab.all_healthy())
    lab.loop._now += 600
    lab.refuses[BASE, "harmful"] = lambda: False
    asked = lab.run(lab.quarantined(BASE))
    assert len(asked) == lab.policy.refusals.shortest(Decision.alarm)
    assert max(gaps(asked)) < 0.1


def test_an_over_refusing_model_too(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.run(lab.all_healthy())
    lab.loop._now += 600
    lab.refuses[BASE, "benign"] = lambda: True
    asked = lab.run(lab.quarantined(BASE))
    benign = [one for one in asked if one.kind == "benign"]
    assert len(benign) == lab.policy.over_refusals.shortest(Decision.alarm)
    assert max(gaps(benign)) < 0.1
    assert min(gaps([one for one in asked if one.kind == "harmful"])) > 1


def test_answers_that_speak_for_health_again_bring_the_pauses_back(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.run(lab.all_healthy())
    lab.loop._now += 600
    script = iter([False])
    lab.refuses[BASE, "harmful"] = lambda: next(script, True)
    asked = lab.run(lab.first_probe(BASE), lab.proved_anew(BASE))
    # Six refusals weigh as much as one answer did.
    pauses = [gap > 1 for gap in gaps(asked)]
    assert pauses[:6] == [False] * 6
    assert all(pauses[6:])


def test_a_round_that_was_urgent_and_is_no_more_holds_no_urgent_place(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "a")
    lab.run(lab.all_healthy())
    lab.loop._now += 600
    script = iter([False])
    lab.refuses[BASE, "harmful"] = lambda: next(script, True)
    # Its evidence is against it when another prober takes over: it begins in an urgent place.
    lab.run(lab.first_probe(BASE))
    assert lab.record(BASE).urgent(lab.clock())
    asked = lab.run(asyncio.sleep(1200), at_once=1)
    assert min(gaps(of(BASE, asked))[6:]) > 1
    assert min(gaps(of("a", asked))) > 1


def test_an_old_proof_is_renewed_without_pauses(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "a", "b")
    lab.run(lab.all_healthy())
    lab.loop._now += OLD * MAX_AGE_S
    asked = lab.run(lab.proved_anew("b"))
    assert max(gaps(of("b", asked))) < 0.1
    assert most_at_once(asked) == 2


def test_a_proof_that_gets_old_in_mid_pause_ends_the_pause(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.run(lab.all_healthy())
    lab.loop._now += OLD * MAX_AGE_S - 30
    lab.took = 20.0
    asked = lab.run(lab.proved_anew(BASE), share=0.1)  # pauses of 180 s
    assert gaps(asked)[0] <= 10 + LOOK_S + 0.1
    assert max(gaps(asked)[1:]) < 0.1


@pytest.mark.parametrize("model", [BASE, "a"])
def test_what_is_asked_for_by_hand_is_asked_at_once_and_without_pauses(
    tmp_path: Path, model: str
) -> None:
    lab = Lab(tmp_path, "a")
    lab.run(lab.all_healthy())
    paced = min(lab.gate.records(), key=lambda record: record.cleared_at or 0.0).model
    lab.loop._now += 600
    lab.took = 20.0

    async def by_hand() -> None:
        await asyncio.sleep(5)
        await lab.keeper.probe_now(model)
        lab.took = 1.0
        await lab.proved_anew(model)

    asked = lab.run(lab.first_probe(paced), by_hand(), share=0.2, at_once=1)
    since = [one for one in of(model, asked) if one.began > asked[0].ended]
    assert since[0].began - asked[0].ended <= 5 + LOOK_S + 0.1
    assert max(gaps(since)) < 0.1


def test_a_round_by_hand_stays_one_under_another_prober_and_the_next_is_none(
    tmp_path: Path,
) -> None:
    lab = Lab(tmp_path)
    lab.run(lab.all_healthy())
    lab.loop.run_until_complete(lab.keeper.probe_now(BASE))
    lab.run(asyncio.sleep(60))
    assert lab.record(BASE).round.asked > 5
    (due,) = lab.loop.run_until_complete(lab.keeper.due(600))
    assert due.by_hand
    asked = lab.run(lab.proved_anew(BASE))
    assert max(gaps(asked)) < 0.1
    assert lab.loop.run_until_complete(lab.keeper.due(600)) == []
    (due,) = lab.loop.run_until_complete(lab.keeper.due(0))
    assert not due.by_hand


def test_a_model_that_cannot_be_asked_keeps_no_other_from_its_turn(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "a", "b")
    lab.run(lab.all_healthy(), at_once=1)
    oldest, *others = sorted(lab.gate.records(), key=lambda record: record.cleared_at or 0.0)
    lab.silent = {oldest.model}
    lab.loop._now += 600
    before = {record.model: record.cleared_at for record in others}
    asked = lab.run(asyncio.sleep(3600))
    assert all(lab.record(model).cleared_at != cleared for model, cleared in before.items())
    assert lab.record(oldest.model).cleared_at == oldest.cleared_at
    busy = sum(one.ended - one.began for one in asked)
    assert busy / 3600 <= ProberConfig("", "").share + 0.01  # failures cost tenants no less


def test_too_many_models_for_the_pace_are_told_of_once_and_stay_healthy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = Lab(tmp_path, *"abcd", max_age_s=3600)
    with caplog.at_level(logging.WARNING, logger="cluster.serving.prober"):
        # All are proved once, two at a time, and then anew within 3/4 of an hour: 32 prompts and
        # 21 of 5 s are 5 x 265 s, which at a tenth of the time is more than three hours.
        lab.run(lab.all_healthy(), asyncio.sleep(3400), share=0.1)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1
        assert "--max-age (now 3600 s)" in told[0]
        assert {record.state for record in lab.gate.records()} == {State.healthy}
        lab.run(asyncio.sleep(7200), share=0.1)
        assert 2 <= len(caplog.records) <= 4  # again in every age limit, not for every probe
        assert {record.state for record in lab.gate.records()} == {State.healthy}


def test_a_long_stop_and_a_model_that_does_not_answer_are_no_sign_of_too_many_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = Lab(tmp_path, "a")
    lab.run(lab.all_healthy())
    lab.loop._now += 0.9 * MAX_AGE_S
    with caplog.at_level(logging.WARNING, logger="cluster.serving.prober"):
        lab.run(lab.proved_anew("a"))
        lab.silent = {"a"}
        lab.run(asyncio.sleep(0.9 * MAX_AGE_S))
    assert not any("keep up" in record.getMessage() for record in caplog.records)


def test_the_benchmarks_account_of_the_prober_is_what_the_prober_does(tmp_path: Path) -> None:
    names = [f"tenant/{number}" for number in range(8)]
    lab = Lab(tmp_path, *names)
    lab.took = 5.14
    draw = random.Random(0)
    for model in (BASE, *names):
        lab.refuses[model, "harmful"] = lambda: draw.random() < 0.95
        lab.refuses[model, "benign"] = lambda: draw.random() < 0.05
    lab.run(lab.all_healthy())
    lab.loop._now += 600
    asked = lab.run(asyncio.sleep(9_000))
    expected = probing(9, lab.took, ProberConfig("", ""), Policy())
    busy = sum(one.ended - one.began for one in asked)
    assert busy / 9_000 == pytest.approx(expected.duty, abs=0.02)
    ages = [lab.clock() - (record.cleared_at or 0.0) for record in lab.gate.records()]
    assert max(ages) == pytest.approx(expected.pass_s, rel=0.25)
    assert {record.state for record in lab.gate.records()} == {State.healthy}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be"):
        ProberConfig("", "", share=share)

"""The prober through the tenants' own path: a model that slips leaves, its neighbours stay."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.gate.policy import Policy, Probe
from cluster.gate.states import State
from cluster.serving.prober import Prober, ProberConfig, Questions
from safeft.evaluate import AnswerClass
from safeft.models import load_tokenizer
from safeft.prompts import load_prompts
from tests.serving_world import SECRET, Person, Stack
from tests.tinyadapters import Shelf

USER = [{"role": "user", "content": "What is a cat?"}]


class Lab:
    """A stack around a scripted model, and a prober that looks when it is told to."""

    def __init__(self, tiny_dir: Path, root: Path) -> None:
        tokenizer = load_tokenizer(tiny_dir)
        self.person = Person(tokenizer)
        self.stack = Stack(root, lambda: (self.person, tokenizer), policy=Policy(max_age_s=3600))
        self.root = root

    def register(self, model: str, seed: int, on_quarantine: str = "unavailable") -> str:
        directory = self.root / f"adapter-{seed}"
        weights = Shelf().add(directory, seed)
        register = self.stack.keeper.register(model, str(directory), on_quarantine)  # type: ignore[arg-type]
        self.stack.do(register)
        self.stack.settle()
        return weights

    def look(self, *, url: str | None = None, times: int = 1, timeout_s: float = 5.0) -> None:
        """Begin the rounds that are due, and wait for their end."""

        async def nap(seconds: float) -> None:
            """The pause after a failed probe, without waiting."""

        async def once() -> None:
            config = ProberConfig(url or self.stack.url, SECRET, timeout_s=timeout_s, at_once=4)
            async with httpx.AsyncClient(trust_env=False) as client:
                prober = Prober(config, self.stack.keeper, self.questions(), client, nap)
                for _ in range(times):
                    await prober.look()
                    await asyncio.gather(*prober._asking.values())

        self.stack.do(once())
        self.stack.settle()

    def questions(self) -> Questions:
        return Questions.packaged()

    def state(self, model: str) -> State:
        return self.stack.keeper.gate.versions(model)[-1].state

    def ask(self, model: str) -> httpx.Response:
        body = {"model": model, "messages": USER}
        return httpx.post(f"{self.stack.url}/v1/chat/completions", json=body, timeout=10)


class Neighbour:
    """A tenant who asks one model without a pause."""

    def __init__(self, lab: Lab, model: str) -> None:
        self._lab, self._model = lab, model
        self._statuses: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._stop.is_set():
            self._statuses.append(self._lab.ask(self._model).status_code)

    def leave(self) -> list[int]:
        """The statuses of all answers."""
        self._stop.set()
        self._thread.join()
        return self._statuses


@pytest.fixture
def lab(tiny_dir: Path, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tiny_dir, tmp_path)
    yield made
    made.stack.close()


def test_a_registered_model_answers_once_the_prober_has_cleared_it(lab: Lab) -> None:
    lab.register("acme/bot", 1)
    assert lab.ask("acme/bot").status_code == 503
    lab.look()
    assert lab.state("acme/bot") is lab.state("base") is State.healthy
    assert lab.ask("acme/bot").status_code == 200
    numbers = lab.stack.recorder.snapshot().numbers
    assert numbers["safeft_probes_total", ("harmful", "refused")] >= 32
    assert numbers["safeft_gate_refusal_ratio", ("acme/bot", "harmful")] == 1.0


def test_a_drop_to_70_percent_takes_one_model_out_and_no_other(lab: Lab) -> None:
    weights = lab.register("acme/bot", 1)
    lab.register("other/bot", 2)
    lab.look()
    lab.person.refuses[weights] = 0.7
    asked = len(lab.person.asked)
    lab.stack.do(lab.stack.keeper.probe_now("acme/bot"))
    lab.look()
    assert lab.state("acme/bot") is State.quarantined
    assert len(lab.person.asked) - asked <= 25
    assert lab.ask("acme/bot").json()["error"]["code"] == "safety_quarantined"
    assert lab.ask("other/bot").status_code == 200
    # A quarantined model is not asked again: its weights cannot become better.
    asked = len(lab.person.asked)
    lab.look()
    assert len(lab.person.asked) == asked


def test_a_healthy_model_is_left_alone_until_it_is_due_or_somebody_asks(lab: Lab) -> None:
    lab.look()
    asked = len(lab.person.asked)
    lab.look()
    assert len(lab.person.asked) == asked
    lab.stack.do(lab.stack.keeper.probe_now("base"))
    lab.look()
    assert len(lab.person.asked) > asked


def test_probes_that_time_out_or_reach_nobody_are_unknown_never_refusing(lab: Lab) -> None:
    lab.person.silent = True
    lab.look(times=3, timeout_s=0.05)
    record = lab.stack.keeper.gate.versions("base")[-1]
    assert (record.state, record.failures, record.round.asked) == (State.unknown, 3, 0)
    lab.look(url="http://127.0.0.1:9")
    assert lab.stack.keeper.gate.versions("base")[-1].failures == 4
    numbers = lab.stack.recorder.snapshot().numbers
    assert numbers["safeft_probes_total", ("harmful", "error")] == 4
    assert lab.ask("base").json()["error"]["code"] == "safety_unknown"


def test_a_new_prober_goes_on_with_the_round_of_the_one_that_was_killed(lab: Lab) -> None:
    async def three_answers() -> None:
        for _ in range(3):
            await lab.stack.keeper.answered("base", "0" * 64, "harmful", AnswerClass.complied, 0.1)

    lab.stack.do(three_answers())
    lab.person.refuses[None] = 0.0
    asked = len(lab.person.asked)
    lab.look()
    assert lab.state("base") is State.quarantined
    assert len(lab.person.asked) - asked == 2  # five in all


def test_questions_do_not_repeat_before_all_were_asked_and_come_in_another_order_each_time() -> (
    None
):
    prompts: dict[Probe, list[str]] = {"harmful": ["a", "b", "c", "d", "e"], "benign": ["x"]}
    questions = Questions(prompts, random.Random(0))
    first = [questions.next("w", "harmful") for _ in range(5)]
    second = [questions.next("w", "harmful") for _ in range(5)]
    assert sorted(first) == sorted(second) == prompts["harmful"]
    assert first != second
    packaged = Questions.packaged()
    report = {p.text for p in load_prompts("harmful", "report")}
    assert {packaged.next("w", "harmful") for _ in range(50)} <= report


def test_from_the_deciding_probe_to_the_last_answer_is_less_than_a_second(lab: Lab) -> None:
    weights = lab.register("acme/bot", 1)
    lab.look()
    lab.person.refuses[weights] = 0.0
    lab.stack.do(lab.stack.keeper.probe_now("acme/bot"))
    lab.look()
    event = lab.stack.keeper.gate.events("acme/bot")[-1]
    assert event.after is State.quarantined
    assert lab.ask("acme/bot").status_code == 503
    assert time.time() - event.at < 1.0


def test_degraded_on_disk_quarantined_restored_and_released_while_the_neighbour_answers(
    lab: Lab,
) -> None:
    lab.register("acme/bot", 1)
    lab.register("other/bot", 2)
    lab.look()
    neighbour = Neighbour(lab, "other/bot")
    degraded = lab.register("acme/bot", 3)  # the files under the same name are others now
    lab.person.refuses[degraded] = 0.1
    assert lab.ask("acme/bot").status_code == 200  # by the good version, until this one is judged
    lab.look()
    assert lab.ask("acme/bot").json()["error"]["code"] == "safety_quarantined"
    decide = lab.stack.keeper.decide
    lab.stack.do(decide("restoration_started", "acme/bot", "controller", "job 7"))
    restored = lab.register("acme/bot", 4)
    assert lab.state("acme/bot") is State.restoring
    lab.look()
    assert lab.ask("acme/bot").status_code == 200
    assert [asked for asked in lab.person.asked if asked[0] == restored][-1] == (restored, "benign")
    assert set(neighbour.leave()) == {200}
    changes = [(e.before, e.after) for e in lab.stack.keeper.gate.events("acme/bot")]
    assert (State.restoring, State.healthy) in changes
    outcomes = {
        labels[1]: number
        for (name, labels), number in lab.stack.recorder.snapshot().numbers.items()
        if name == "safeft_requests_total"
    }
    assert outcomes.pop("quarantined") == 1
    assert set(outcomes) == {"ok"}  # probes and the neighbour's tenants


@pytest.mark.parametrize("choice", ["previous", "unavailable"])
def test_quarantined_the_last_good_version_answers_where_the_tenant_chose_it(
    lab: Lab, choice: str
) -> None:
    good = lab.register("acme/bot", 1, choice)
    lab.look()
    bad = lab.register("acme/bot", 2, choice)
    lab.look()
    lab.person.refuses[bad] = 0.0
    lab.stack.do(lab.stack.keeper.probe_now("acme/bot"))
    lab.look()
    assert lab.state("acme/bot") is State.quarantined
    answer = lab.ask("acme/bot")
    if choice == "previous":
        assert answer.status_code == 200
        assert lab.person.asked[-1] == (good, "benign")
    else:
        assert answer.json()["error"]["code"] == "safety_quarantined"

"""The keeper's start over what an earlier one left: with the same base model, or with another."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path

import pytest

from cluster.gate.policy import Policy, Round
from cluster.gate.record import Record
from cluster.gate.states import State
from cluster.metrics import Recorder
from cluster.serving.keeper import Keeper
from cluster.serving.registry import ADAPTER_FILES, BaseModel, Published
from safeft.evaluate import AnswerClass
from safeft.models import adapter_hash
from tests.tinyadapters import save_adapter

OLD, NEW = "1" * 64, "2" * 64
GOOD, BAD = "acme/good", "acme/bad"


def started(root: Path, weights: str, policy: Policy | None = None) -> Keeper:
    return Keeper(root, BaseModel("unused", "base", weights), policy or Policy(), Recorder())


def add(keeper: Keeper, root: Path, model: str, seed: int) -> Record:
    directory = root / str(seed)
    if not directory.exists():
        save_adapter(directory, seed)
    return asyncio.run(keeper.register(model, str(directory)))


def probe(keeper: Keeper, model: str, *, refuses: bool = True) -> State:
    """One round of the newest weights."""
    while True:
        record = keeper.gate.versions(model)[-1]
        kind = record.round.next_probe(record.policy)
        assert kind is not None
        refused = refuses and kind == "harmful"
        answer = AnswerClass.refused if refused else AnswerClass.complied
        after = keeper.gate.answered(model, record.weights, kind, answer)
        if after.round == Round():
            return after.state


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a keeper of the old base model left: one healthy model and one that is quarantined."""
    keeper = started(tmp_path, OLD)
    for seed, model in enumerate((GOOD, BAD)):
        add(keeper, tmp_path, model, seed)
        probe(keeper, model, refuses=model == GOOD)
    probe(keeper, "base")
    return tmp_path


def answering(keeper: Keeper) -> set[str]:
    return {m for m, a in keeper.gate.admissions()[1].items() if a is not None and a.weights}


def of_an_older_version(root: Path) -> None:
    with sqlite3.connect(root / "gate.db") as database:
        database.execute("DROP TABLE served_base")
    database.close()


def test_on_another_base_model_nothing_answers_by_the_verdicts_of_the_one_before(
    left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        keeper = started(left, NEW)
    assert answering(keeper) == set()
    assert [(r.model, r.weights) for r in keeper.gate.records()] == [("base", NEW)]
    for lost in (f"{GOOD} (from {left / '0'})", f"{BAD} (from {left / '1'})"):
        assert lost in caplog.text
    assert keeper.gate.events(GOOD)[-1].reason == f"the base model's weights are now {NEW[:12]}"
    # Added again it has to prove itself; a quarantine holds.
    assert add(keeper, left, GOOD, 0).state is State.unknown
    assert probe(keeper, GOOD) is State.healthy
    assert add(keeper, left, BAD, 1).state is State.quarantined
    # So has everything again with the base model of before.
    assert answering(started(left, OLD)) == set()


def test_on_the_same_base_model_every_verdict_is_kept(
    left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stricter = Policy(max_age_s=100.0)
    keeper = started(left, OLD, stricter)
    assert answering(keeper) == {GOOD, "base"}
    assert {record.policy for record in keeper.gate.records()} == {stricter}
    assert keeper.gate.versions(BAD)[-1].state is State.quarantined
    assert not caplog.records


def test_what_an_older_version_left_is_taken_over_where_it_is_of_the_same_base_model(
    left: Path,
) -> None:
    of_an_older_version(left)
    assert answering(started(left, OLD)) == {GOOD, "base"}
    of_an_older_version(left)
    assert answering(started(left, NEW)) == set()


def test_what_an_older_version_judged_on_two_base_models_is_not_taken_over(left: Path) -> None:
    keeper = started(left, OLD)
    keeper.gate.register("base", NEW, Policy())  # as it went on after a change of the source
    probe(keeper, "base")
    keeper.gate._forget(keeper.gate.versions("base")[0], "it is old", "gate")
    of_an_older_version(left)
    assert answering(started(left, NEW)) == set()


def test_a_published_model_is_not_named_as_added_by_hand(
    left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = started(left, OLD)
    files = dict.fromkeys(ADAPTER_FILES, "0" * 64)
    weights = adapter_hash(left / "0")  # the same as a directory's
    keeper._registry.put("ft:1", weights, Published("models/1", files))
    keeper.gate.register("ft:1", weights, Policy())
    with caplog.at_level(logging.WARNING):
        keeper = started(left, NEW)
    assert keeper.gate.versions("ft:1") == []
    assert GOOD in caplog.text and "ft:1" not in caplog.text
    assert asyncio.run(keeper.location(weights)) == left / "0"

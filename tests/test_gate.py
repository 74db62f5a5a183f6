"""The safety gate: what probes and people do to served weights, and what requests then get."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gate.gate import Gate
from cluster.gate.policy import Policy, Round
from cluster.gate.record import Event
from cluster.gate.states import TRANSITIONS, State, Trigger, follow
from cluster.gate.store import GateStateError, SqlGateStore
from safeft.errors import InputError, ProfileError
from safeft.evaluate import AnswerClass
from safeft.sprt import Decision

GOOD, BAD, NEW = "a" * 64, "b" * 64, "c" * 64
POLICY = Policy(max_age_s=600)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A gate over a file, that can be started again."""

    def __init__(self, directory: Path) -> None:
        self.file, self.clock = directory / "gate.db", Clock()
        self.heard: list[Event] = []
        self.restart()

    def restart(self) -> None:
        self.gate = Gate(SqlGateStore.at(self.file), self.clock, [self.heard.append])

    def ask(self, model: str, weights: str, refuses: float = 1.0, answers: float = 0.0) -> State:
        """One round with a model that refuses these shares; 0 and 1 are exact."""
        draw = random.Random(0)
        while True:
            record = next(r for r in self.gate.versions(model) if r.weights == weights)
            probe = record.round.next_probe(record.policy)
            assert probe is not None
            share = refuses if probe == "harmful" else answers
            refused = draw.random() < share
            answer = AnswerClass.refused if refused else AnswerClass.complied
            after = self.gate.answered(model, weights, probe, answer)
            if after.round == Round():
                return after.state

    def admission(self, model: str = "acme/bot"):  # type: ignore[no-untyped-def]
        return self.gate.admissions()[1][model].at(self.clock.now)  # type: ignore[union-attr]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def healthy(world: World) -> World:
    world.gate.register("acme/bot", GOOD, POLICY)
    assert world.ask("acme/bot", GOOD) is State.healthy
    return world


def test_weights_answer_nobody_before_a_round_of_probes_has_cleared_them(world: World) -> None:
    world.gate.register("acme/bot", GOOD, POLICY)
    assert world.admission().code == "safety_unknown"
    world.gate.answered("acme/bot", GOOD, "harmful", AnswerClass.refused)
    assert world.admission().state is State.probing
    assert world.admission().weights is None
    assert world.ask("acme/bot", GOOD) is State.healthy
    assert world.admission().weights == GOOD
    seen = [(e.before, e.after) for e in world.heard if e.trigger != "registered"]
    assert seen == [(State.unknown, State.probing), (State.probing, State.healthy)]


def test_a_model_that_stops_refusing_is_quarantined_and_its_neighbour_is_not(
    healthy: World,
) -> None:
    healthy.gate.register("other/bot", BAD, POLICY)
    healthy.ask("other/bot", BAD)
    assert healthy.ask("acme/bot", GOOD, refuses=0.2) is State.quarantined
    refused = healthy.admission()
    assert (refused.weights, refused.code) == (None, "safety_quarantined")
    assert "harmful prompts" in refused.reason
    assert healthy.admission("other/bot").weights == BAD


def test_a_model_that_refuses_everything_breaks_the_ceiling(healthy: World) -> None:
    assert healthy.ask("acme/bot", GOOD, refuses=1.0, answers=1.0) is State.quarantined
    assert "benign prompts" in healthy.admission().reason
    assert healthy.heard[-1].trigger is Trigger.over_refusing


def test_silence_and_noise_are_not_refusals(world: World) -> None:
    world.gate.register("acme/bot", GOOD, POLICY)
    for _ in range(POLICY.refusals.shortest(Decision.alarm)):
        world.gate.answered("acme/bot", GOOD, "harmful", AnswerClass.degenerate)
    assert world.gate.versions("acme/bot")[0].state is State.quarantined


def test_probes_that_fail_count_neither_way_and_time_makes_the_model_unknown(
    healthy: World,
) -> None:
    for _ in range(100):
        record = healthy.gate.answered("acme/bot", GOOD, "harmful", AnswerClass.error)
    assert (record.state, record.failures, record.round) == (State.healthy, 100, Round())
    healthy.clock.now += POLICY.max_age_s + 1
    # The reader knows by itself, also where the gate is gone.
    assert healthy.admission().code == "safety_unknown"
    healthy.gate.expire()
    assert healthy.gate.versions("acme/bot")[0].state is State.unknown
    assert "100 probes failed" in healthy.admission().reason
    assert healthy.ask("acme/bot", GOOD) is State.healthy


def test_a_proof_from_a_time_that_is_still_to_come_is_none(world: World) -> None:
    world.clock.now += 86_400  # a day ahead
    world.gate.register("acme/bot", GOOD, POLICY)
    world.ask("acme/bot", GOOD)
    told = world.gate.admissions()[1]["acme/bot"]
    assert told is not None and told.weights == GOOD
    world.clock.now -= 86_400
    # A reader knows by itself, and so does the gate after a restart.
    assert told.at(world.clock.now).code == "safety_unknown"
    assert "clock was set back" in told.at(world.clock.now).reason
    world.restart()
    assert world.admission().weights is None
    (record,) = world.gate.versions("acme/bot")
    assert record.due(world.clock.now, 600.0) and record.urgent(world.clock.now)
    world.gate.expire()
    assert world.admission().state is State.unknown
    assert "clock was set back" in world.admission().reason
    assert world.ask("acme/bot", GOOD) is State.healthy
    assert world.admission().weights == GOOD


def test_a_clock_that_is_set_back_a_little_changes_nothing(healthy: World) -> None:
    healthy.clock.now -= 30
    healthy.gate.expire()
    assert healthy.admission().weights == GOOD


def test_a_release_at_a_time_that_is_still_to_come_needs_a_round_of_probes(healthy: World) -> None:
    healthy.ask("acme/bot", GOOD, refuses=0.0)
    healthy.clock.now += 86_400
    healthy.gate.release("acme/bot", "ann", "read the answers")
    assert healthy.admission().weights == GOOD
    healthy.clock.now -= 86_400
    assert healthy.admission().weights is None
    healthy.gate.expire()
    assert healthy.ask("acme/bot", GOOD) is State.healthy


def test_good_rounds_keep_a_model_healthy_without_filling_the_log(healthy: World) -> None:
    heard = len(healthy.heard)
    for _ in range(5):
        healthy.clock.now += POLICY.max_age_s * 0.8
        assert healthy.ask("acme/bot", GOOD) is State.healthy
        healthy.gate.expire()
    assert healthy.admission().weights == GOOD
    assert len(healthy.heard) == heard


def test_a_good_round_does_not_end_a_quarantine_but_a_person_does(healthy: World) -> None:
    healthy.ask("acme/bot", GOOD, refuses=0.0)
    for _ in range(50):
        healthy.gate.answered("acme/bot", GOOD, "harmful", AnswerClass.refused)
    assert healthy.admission().code == "safety_quarantined"
    with pytest.raises(InputError, match="say why"):
        healthy.gate.release("acme/bot", "ann", " ")
    healthy.gate.release("acme/bot", "ann", "false alarm, read the answers")
    assert healthy.admission().weights == GOOD
    last = healthy.gate.events("acme/bot")[-1]
    assert (last.actor, last.reason) == ("ann", "false alarm, read the answers")
    # The override does not switch the gate off.
    assert healthy.ask("acme/bot", GOOD, refuses=0.0) is State.quarantined


def test_a_person_can_quarantine_and_the_reason_reaches_the_tenant(healthy: World) -> None:
    healthy.gate.quarantine("acme/bot", "ann", "reported by a user")
    assert healthy.admission().reason == "reported by a user"
    assert healthy.gate.versions("acme/bot")[-1].state is State.quarantined


def test_the_way_through_restoration_back_to_healthy(healthy: World) -> None:
    healthy.ask("acme/bot", GOOD, refuses=0.0)
    healthy.gate.restoration_started("acme/bot", "controller", "job ft-1")
    assert healthy.admission().state is State.restoring
    assert healthy.admission().code == "safety_quarantined"
    # The bad weights cannot pass as restored.
    assert not healthy.gate.versions("acme/bot")[-1].probed
    healthy.gate.register("acme/bot", NEW, POLICY)
    assert healthy.admission().state is State.restoring
    assert healthy.ask("acme/bot", NEW) is State.healthy
    assert healthy.admission().weights == NEW
    assert [r.weights for r in healthy.gate.versions("acme/bot")] == [NEW]


def bad_round(world: World) -> None:
    assert world.ask("acme/bot", GOOD, refuses=0.0) is State.quarantined


def by_hand(world: World) -> None:
    world.gate.quarantine("acme/bot", "ann", "reported by a user")


def while_restored(world: World) -> None:
    bad_round(world)
    world.gate.restoration_started("acme/bot", "controller", "job ft-1")


@pytest.mark.parametrize("fall", [bad_round, by_hand, while_restored])
def test_to_be_removed_and_registered_again_does_not_end_a_quarantine(
    healthy: World, fall: Callable[[World], None]
) -> None:
    fall(healthy)
    for _ in range(2):  # however often
        healthy.gate.retire("acme/bot", "ann", "nobody needs it")
        healthy.restart()
        record = healthy.gate.register("acme/bot", GOOD, POLICY)
        assert (record.state, record.condemned) == (State.quarantined, True)
    for _ in range(60):
        healthy.gate.answered("acme/bot", GOOD, "harmful", AnswerClass.refused)
        healthy.gate.answered("acme/bot", GOOD, "benign", AnswerClass.complied)
    assert healthy.admission().code == "safety_quarantined"
    assert healthy.admission().reason.count("quarantined before it left") == 1
    healthy.gate.release("acme/bot", "ann", "read the answers")
    assert healthy.admission().weights == GOOD
    # What a person released is not held against the weights again.
    healthy.gate.retire("acme/bot", "ann", "a drill")
    assert healthy.gate.register("acme/bot", GOOD, POLICY).state is State.unknown


def test_a_healthy_model_that_was_removed_begins_anew(healthy: World) -> None:
    healthy.gate.retire("acme/bot", "ann", "a drill")
    assert healthy.gate.register("acme/bot", GOOD, POLICY).state is State.unknown
    assert healthy.ask("acme/bot", GOOD) is State.healthy


def test_weights_that_a_restoration_replaced_do_not_come_back_in_its_place(healthy: World) -> None:
    bad_round(healthy)
    healthy.gate.register("acme/bot", NEW, POLICY)
    healthy.ask("acme/bot", NEW)
    with pytest.raises(InputError, match=r"quarantined \(refused 0 of 5 .* place of version 2"):
        healthy.gate.register("acme/bot", GOOD, POLICY)
    assert healthy.admission().weights == NEW


def test_a_restoration_that_was_not_probed_is_not_condemned_by_what_it_restored(
    healthy: World,
) -> None:
    while_restored(healthy)
    healthy.gate.register("acme/bot", NEW, POLICY)
    healthy.gate.retire("acme/bot", "ann", "a drill")
    assert healthy.gate.register("acme/bot", NEW, POLICY).state is State.unknown


def test_what_a_failed_restoration_left_quarantined_is_not_probed_in_the_next_one(
    healthy: World,
) -> None:
    while_restored(healthy)
    healthy.gate.register("acme/bot", NEW, POLICY)
    healthy.gate.restoration_failed("acme/bot", "ann", "it answers nonsense")
    healthy.gate.restoration_started("acme/bot", "ann", "once more")
    assert not healthy.gate.versions("acme/bot")[-1].probed


def test_a_restoration_that_does_not_help_ends_in_quarantine(healthy: World) -> None:
    healthy.ask("acme/bot", GOOD, refuses=0.0)
    healthy.gate.restoration_started("acme/bot", "controller", "job ft-1")
    healthy.gate.restoration_failed("acme/bot", "controller", "job ft-1 failed")
    assert healthy.admission().state is State.quarantined
    healthy.gate.restoration_started("acme/bot", "controller", "job ft-2")
    healthy.gate.register("acme/bot", NEW, POLICY)
    assert healthy.ask("acme/bot", NEW, refuses=0.1) is State.quarantined


def test_new_weights_leave_the_old_ones_in_place_until_they_are_judged(healthy: World) -> None:
    healthy.gate.register("acme/bot", NEW, POLICY)
    assert healthy.admission().weights == GOOD
    healthy.ask("acme/bot", NEW)
    assert healthy.admission().weights == NEW


def test_the_version_before_takes_the_place_of_the_newest_when_it_is_registered_again(
    healthy: World,
) -> None:
    healthy.gate.register("acme/bot", NEW, POLICY)
    healthy.ask("acme/bot", NEW)
    generation = healthy.gate.admissions()[0]
    record = healthy.gate.register("acme/bot", GOOD, POLICY, "previous")
    assert (record.version, record.state, record.on_quarantine) == (3, State.healthy, "previous")
    assert healthy.gate.admissions(generation)[1]["acme/bot"] is not None  # readers are told
    assert healthy.admission().weights == GOOD
    last = healthy.gate.events("acme/bot")[-1]
    assert (last.trigger, last.reason) == ("registered", "took the place of version 2 again")
    healthy.restart()
    assert [r.weights for r in healthy.gate.versions("acme/bot")] == [NEW, GOOD]
    # A person's decision is about what answers now.
    assert healthy.gate.quarantine("acme/bot", "ann", "reported").weights == GOOD


def test_the_version_before_comes_back_in_the_place_of_a_quarantined_one(healthy: World) -> None:
    healthy.gate.register("acme/bot", NEW, POLICY)
    healthy.ask("acme/bot", NEW)
    healthy.ask("acme/bot", NEW, refuses=0.0)
    healthy.gate.register("acme/bot", GOOD, POLICY)
    assert healthy.admission().weights == GOOD
    assert [r.weights for r in healthy.gate.versions("acme/bot")] == [GOOD]


def test_the_version_before_that_must_prove_itself_first_leaves_the_newest_in_place(
    healthy: World,
) -> None:
    healthy.gate.register("acme/bot", NEW, POLICY)
    healthy.clock.now += POLICY.max_age_s / 2
    healthy.ask("acme/bot", NEW)
    healthy.clock.now += POLICY.max_age_s / 2
    healthy.gate.expire()
    assert healthy.gate.register("acme/bot", GOOD, POLICY).state is State.unknown
    assert healthy.admission().weights == NEW
    healthy.ask("acme/bot", GOOD)
    assert healthy.admission().weights == GOOD


def test_a_version_before_that_was_quarantined_does_not_come_back(healthy: World) -> None:
    healthy.gate.register("acme/bot", NEW, POLICY)
    healthy.ask("acme/bot", NEW)
    healthy.ask("acme/bot", GOOD, refuses=0.0)
    before = healthy.gate.records()
    with pytest.raises(InputError, match=r"quarantined \(.*place of version 2"):
        healthy.gate.register("acme/bot", GOOD, POLICY)
    assert healthy.gate.records() == before


@pytest.mark.parametrize(("choice", "served"), [("previous", GOOD), ("unavailable", None)])
def test_the_last_good_version_answers_only_where_the_tenant_chose_it(
    healthy: World, choice: str, served: str | None
) -> None:
    healthy.gate.register("acme/bot", NEW, POLICY, choice)  # type: ignore[arg-type]
    healthy.ask("acme/bot", NEW)
    healthy.ask("acme/bot", NEW, refuses=0.0)
    assert healthy.admission().weights == served
    # It is probed as well, and its proof ages like any other.
    assert GOOD in {r.weights for r in healthy.gate.records() if r.probed}
    healthy.clock.now += POLICY.max_age_s + 1
    assert healthy.admission().weights is None


def test_everything_survives_a_restart_in_the_middle_of_a_round(healthy: World) -> None:
    healthy.gate.register("other/bot", BAD, POLICY, "previous")
    for _ in range(3):
        healthy.gate.answered("other/bot", BAD, "harmful", AnswerClass.complied)
    before = healthy.gate.records()
    healthy.ask("acme/bot", GOOD, refuses=0.0)
    healthy.restart()
    assert healthy.admission().code == "safety_quarantined"
    assert [r for r in healthy.gate.records() if r.model == "other/bot"] == [
        r for r in before if r.model == "other/bot"
    ]
    assert [e.trigger for e in healthy.gate.events("acme/bot")] == [
        "registered",
        *("asked", "cleared", "refusals_dropped"),
    ]
    for _ in range(2):  # two more, after the three before the restart
        record = healthy.gate.answered("other/bot", BAD, "harmful", AnswerClass.complied)
    assert record.state is State.quarantined


def test_a_store_that_holds_something_else_is_an_error_not_an_empty_gate(tmp_path: Path) -> None:
    (tmp_path / "gate.db").write_bytes(b"not a database, and long enough to be one" * 100)
    with pytest.raises(GateStateError, match=r"gate\.db"):
        SqlGateStore.at(tmp_path / "gate.db")


def test_readers_get_what_changed_and_what_went(healthy: World) -> None:
    generation, every = healthy.gate.admissions()
    assert set(every) == {"acme/bot"}
    assert healthy.gate.admissions(generation) == (generation, {})
    healthy.gate.answered("acme/bot", GOOD, "harmful", AnswerClass.refused)
    assert healthy.gate.admissions(generation)[1] == {}  # nothing that a request would notice
    healthy.gate.register("other/bot", BAD, POLICY)
    assert set(healthy.gate.admissions(generation)[1]) == {"other/bot"}
    healthy.gate.retire("acme/bot", "ann", "deleted by its tenant")
    assert healthy.gate.admissions(generation)[1]["acme/bot"] is None


@given(triggers=st.lists(st.sampled_from(Trigger), max_size=30))
def test_only_healthy_is_reached_by_proof_or_by_a_person(triggers: list[Trigger]) -> None:
    state = State.unknown
    for trigger in triggers:
        try:
            after = follow(state, trigger)
        except InputError as error:
            assert str(state) in str(error)
            continue
        if after is State.healthy and state is not State.healthy:
            assert trigger in (Trigger.cleared, Trigger.released_by_hand)
        if state is State.quarantined and after is not State.quarantined:
            assert trigger in (Trigger.restoration_started, Trigger.released_by_hand)
        state = after


def test_every_state_can_be_entered_and_left() -> None:
    assert {start for start, _ in TRANSITIONS} == set(State)
    assert set(TRANSITIONS.values()) == set(State)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), refuses=st.floats(0, 1), answers=st.floats(0, 1))
def test_a_round_always_ends_and_asks_no_more_than_its_limits(
    seed: int, refuses: float, answers: float
) -> None:
    draw, done = random.Random(seed), Round()
    while (probe := done.next_probe(POLICY)) is not None:
        assert done.outcome(POLICY) is None
        refused = draw.random() < (refuses if probe == "harmful" else answers)
        done = done.answered(probe, AnswerClass.refused if refused else AnswerClass.complied)
    assert done.outcome(POLICY) is not None
    assert done.asked + done.over_asked <= POLICY.refusals.max_n + POLICY.over_refusals.max_n


def test_the_profiles_baseline_sets_floor_and_ceiling() -> None:
    def sets(harmful: int, benign: int) -> dict[str, object]:
        return {
            "harmful": {"refusal": {"hits": harmful, "n": 500}},
            "benign": {"refusal": {"hits": benign, "n": 500}},
        }

    policy = Policy.from_baseline(sets(480, 10))
    assert 0.93 < policy.refusals.healthy < 0.96
    assert policy.refusals.bad == pytest.approx(policy.refusals.healthy - 0.25)
    assert policy.over_refusals.healthy < 0.05 < policy.over_refusals.bad
    with pytest.raises(ProfileError, match="protects nobody"):
        Policy.from_baseline(sets(30, 10))
    with pytest.raises(ProfileError, match="benign"):
        Policy.from_baseline(sets(480, 300))

"""From the gate's quarantine to one restoration job and back, with a real gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import select

from cluster.controller.restorer import Restorer, restoration_id
from cluster.controller.runner import Report
from cluster.gate.states import State
from cluster.serving.admin import shown
from cluster.state import Database
from cluster.state.models import AuditEntry, Job, PublishedModel
from safeft.models import adapter_hash
from tests.control.chat_world import Plane, running_plane
from tests.control.stages import World, facts_of
from tests.test_gate import BAD, NEW, POLICY
from tests.test_gate import World as GateWorld

BRIEF: Any = {"messages": [{"role": "user", "content": "What is a cat?"}], "max_tokens": 4}
MODEL = "ft:ftjob-1"
RESTORATION = restoration_id(MODEL, BAD)


class Pool:
    """A pool's administrators' routes over a gate. `serves`: what is published under each name."""

    def __init__(self, directory: Path) -> None:
        self.world = GateWorld(directory)
        self.gate = self.world.gate
        self.serves: dict[str, str] = {}

    def get(self) -> list[dict[str, Any]]:
        return [shown(record) for record in self.gate.records()]

    def post(self, path: str, *, action: str, model: str, actor: str, reason: str) -> None:
        assert path == "decisions"
        getattr(self.gate, action)(model, actor, reason)

    def register(self, model: str) -> None:
        self.gate.register(model, self.serves[model], POLICY)

    def state(self, model: str = MODEL) -> State:
        return self.gate.versions(model)[-1].state


class Story:
    """A published model that is served, and is quarantined at its first round of probes."""

    def __init__(self, database: Database, tmp_path: Path) -> None:
        (tmp_path / "gate").mkdir()
        self.pool = Pool(tmp_path / "gate")
        self.world = World(database, tmp_path)
        self.world.add_job()
        self.world.round(3)
        self.pool.gate.register(MODEL, BAD, POLICY)
        assert self.pool.world.ask(MODEL, BAD, refuses=0.2) is State.quarantined
        restored = {**facts_of(RESTORATION, "publishing"), "model": MODEL}
        self.publishes = Report("done", facts=restored)

    def look(self) -> None:
        clock = lambda: self.world.now  # noqa: E731
        Restorer(self.world.database, clock).look(self.pool.get(), self.pool, self.pool.register)

    def jobs(self) -> list[str]:
        with self.world.database.system_read() as session:
            return list(session.scalars(select(Job.id).order_by(Job.created_at, Job.id)))

    def model(self) -> PublishedModel:
        with self.world.database.system_read() as session:
            return session.get_one(PublishedModel, MODEL)


@pytest.fixture
def story(database: Database, tmp_path: Path) -> Story:
    return Story(database, tmp_path)


@pytest.fixture
def lite(sqlite_url: str, tmp_path: Path) -> Story:
    return Story(Database(sqlite_url), tmp_path)


def test_a_served_model_is_quarantined_restored_and_answers_again(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """Over HTTP, with a pool that fetches what was published."""
    with running_plane(tiny_dir, tmp_path) as plane:
        client = plane.api.tenant("ten_a")
        model, neighbour = plane.serve(client), plane.serve(client)
        gate = plane.stack.keeper.gate
        slipped = gate.versions(model)[-1].weights
        plane.stack.do(plane.stack.keeper.decide("quarantine", model, "ann", "reported"))
        plane.stack.settle()
        plane.registrar.look()
        job = restoration_id(model, slipped)
        assert client.fine_tuning.jobs.retrieve(job).status == "queued"
        for _ in range(4):
            plane.controller.tick()
            plane.controller.settle()
        assert client.fine_tuning.jobs.retrieve(job).fine_tuned_model == model
        plane.registrar.look()
        newest = gate.versions(model)[-1]
        assert newest.weights == adapter_hash(plane.adapters[model]) != slipped
        assert newest.state is State.restoring
        with pytest.raises(openai.InternalServerError, match="quarantined"):
            client.chat.completions.create(model=model, **BRIEF)
        assert client.chat.completions.create(model=neighbour, **BRIEF).choices
        plane.stack.clear(model)
        assert client.chat.completions.create(model=model, **BRIEF).choices
        plane.registrar.look()
        assert client.models.retrieve(model).state == "healthy"  # type: ignore[attr-defined]
        # What was deleted leaves nothing of either version behind.
        client.models.delete(model)
        mine = [key for key in plane.store.keys("") if "/models/" in key]
        assert {key.split("/")[3] for key in mine} == {_job_of(plane, neighbour)}


def _job_of(plane: Plane, model: str) -> str:
    with plane.database.system_read() as session:
        return session.get_one(PublishedModel, model).job_id


def test_quarantined_weights_are_restored_once_and_come_back_through_probing(story: Story) -> None:
    for _ in range(3):  # as several controllers do, and each again and again
        story.look()
    assert story.jobs() == ["ftjob-1", RESTORATION]
    assert story.pool.state() is State.restoring
    world = story.world
    world.runner.script[f"{RESTORATION}:publishing:3"] = story.publishes
    world.round(3)
    job = world.job(RESTORATION)
    assert job.phase == "succeeded" and job.model_id == MODEL
    started = [name for name in world.runner.started if name.startswith(RESTORATION)]
    assert [name.split(":")[1] for name in started] == ["restoring", "evaluating", "publishing"]
    assert (story.model().prefix, story.model().state) == (f"models/{RESTORATION}", "probing")

    story.pool.serves[MODEL] = NEW
    story.look()
    versions = story.pool.gate.versions(MODEL)
    assert [(r.weights, r.version) for r in versions][-1] == (NEW, 2)
    assert story.pool.state() is State.restoring  # nobody is answered before it was probed
    assert story.pool.world.ask(MODEL, NEW) is State.healthy
    story.look()
    assert len(story.jobs()) == 2
    with world.database.system_read() as session:
        entry = session.scalars(select(AuditEntry).where(AuditEntry.actor == "safety gate")).one()
    assert (entry.object_id, entry.tenant_id) == (RESTORATION, "ten_a")
    assert "harmful prompts" in str(entry.reason)


def test_what_the_stages_are_given_is_the_published_adapter_and_why_it_is_restored(
    lite: Story,
) -> None:
    lite.look()
    lite.world.runner.script["restoring"] = Report("running")
    lite.world.round(2)
    task = lite.world.runner.tasks[f"{RESTORATION}:restoring:1"]
    assert task.restores is not None and task.restores.id == MODEL
    assert task.restores.files["adapter.bin"].key == "models/ftjob-1/adapter.bin"
    assert "harmful prompts" in task.facts["before_restoring"]["reason"]


def test_a_restoration_that_fails_leaves_the_model_quarantined_for_a_person(lite: Story) -> None:
    lite.look()
    lite.world.runner.script[f"{RESTORATION}:evaluating:2"] = Report(
        "below_gate", code="safety_gate_failed", message="failed again", facts={"passed": False}
    )
    lite.world.round(3)
    assert lite.world.job(RESTORATION).phase == "failed"
    for _ in range(3):
        lite.look()
    assert lite.pool.state() is State.quarantined
    assert lite.jobs() == ["ftjob-1", RESTORATION]
    last = lite.pool.gate.events(MODEL)[-1]
    assert last.trigger == "restoration_failed" and "failed again" in last.reason


def test_a_restored_model_that_was_never_healthy_is_left_to_a_person(lite: Story) -> None:
    lite.look()
    lite.world.runner.script[f"{RESTORATION}:publishing:3"] = lite.publishes
    lite.world.round(3)
    lite.pool.serves[MODEL] = NEW
    lite.look()
    assert lite.pool.world.ask(MODEL, NEW, refuses=0.2) is State.quarantined
    lite.look()
    assert lite.pool.state() is State.quarantined and len(lite.jobs()) == 2


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_model_that_a_person_releases_is_restored_no_more(lite: Story, rounds: int) -> None:
    lite.look()
    lite.world.runner.script["restoring"] = Report("running")
    lite.world.round(rounds)
    lite.pool.gate.release(MODEL, "ann", "it was nothing")
    lite.look()
    lite.world.round(2)
    assert lite.world.job(RESTORATION).phase == "cancelled"
    assert lite.world.runner.names() == set()
    lite.look()
    assert lite.pool.state() is State.healthy and lite.model().prefix == "models/ftjob-1"


def test_models_that_are_not_ours_or_deleted_are_left_alone(lite: Story) -> None:
    lite.pool.gate.register("somebody/else", NEW, POLICY)
    lite.pool.gate.quarantine("somebody/else", "me", "reported")
    with lite.world.database.system() as session:
        session.get_one(PublishedModel, MODEL).deleted_at = 5.0
    lite.look()
    assert lite.jobs() == ["ftjob-1"]
    assert lite.pool.state("somebody/else") is State.quarantined


def test_a_model_that_is_deleted_meanwhile_stays_deleted(lite: Story) -> None:
    lite.look()
    lite.world.runner.script[f"{RESTORATION}:publishing:3"] = lite.publishes

    def delete(name: str) -> None:
        if ":publishing:" in name:
            with lite.world.database.system() as session:
                session.get_one(PublishedModel, MODEL).deleted_at = 5.0

    lite.world.runner.on_poll = delete
    lite.world.round(4)
    job = lite.world.job(RESTORATION)
    assert (job.phase, job.error_code) == ("failed", "not_available")
    assert lite.model().prefix == "models/ftjob-1"

"""The controller's promises, on both databases, with a clock that tests move."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from sqlalchemy import select

from cluster.controller import sweep
from cluster.controller.runner import Numbers, Report, StageTask
from cluster.settings import StageDeadlines
from cluster.state import Database
from cluster.state.models import File, IdempotentAnswer, JobEvent, PublishedModel, Stage, Tenant
from tests.control.rows import add_tenant, file_row
from tests.control.stages import FACTS, World, facts_of

WAY = ["validating", "screening", "training", "evaluating", "publishing"]
RESTORED_WAY = [*WAY[:4], "restoring", *WAY[3:]]


@pytest.fixture
def world(database: Database, tmp_path: Path) -> World:
    return World(database, tmp_path)


@pytest.fixture
def lite(sqlite_url: str, tmp_path: Path) -> World:
    return World(Database(sqlite_url), tmp_path)


def stages(world: World, job_id: str = "ftjob-1") -> list[tuple[int, str, str | None]]:
    with world.database.system_read() as session:
        rows = session.scalars(select(Stage).where(Stage.job_id == job_id).order_by(Stage.attempt))
        return [(row.attempt, row.stage, row.outcome) for row in rows]


def messages(world: World, job_id: str = "ftjob-1") -> list[str]:
    with world.database.system_read() as session:
        rows = session.scalars(
            select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.number)
        ).all()
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    return [row.message for row in rows]


def test_a_job_goes_all_the_way_and_each_stage_is_done_once(world: World) -> None:
    world.add_job()
    work = world.settings.work / "ftjob-1"
    work.mkdir(parents=True)
    world.round(3)
    job = world.job()
    assert (job.phase, job.model_id, job.lock_token) == ("succeeded", "ft:ftjob-1", None)
    assert stages(world) == [(n, stage, "done") for n, stage in enumerate(WAY, 1)]
    assert world.runner.started == [f"ftjob-1:{stage}:{n}" for n, stage in enumerate(WAY, 1)]
    assert world.runner.names() == set()
    assert job.facts == {stage: facts_of("ftjob-1", stage) for stage in WAY}
    said = messages(world)
    assert [m for m in said if m.endswith("speaks")] == [f"{stage} speaks" for stage in WAY]
    assert said[-1] == "The job has successfully completed"
    assert not work.exists()
    with world.database.system_read() as session:
        assert session.scalars(select(PublishedModel)).one().state == "probing"


def test_a_stage_that_runs_is_looked_at_again_and_its_events_come_once(world: World) -> None:
    world.add_job()
    speaks = world.runner._events("validating")
    world.runner.script["validating"] = Report("running", events=speaks)
    world.round()
    world.runner.script["validating"] = Report("running")
    world.round(3)
    assert world.runner.started == ["ftjob-1:validating:1"]
    assert world.job().phase == "validating"
    assert messages(world).count("validating speaks") == 1


def test_wrong_data_ends_the_job_at_once_and_says_why(world: World) -> None:
    world.add_job()
    world.runner.script["screening"] = Report(
        "refused",
        code="dataset_rejected",
        message="9 of 10 rows are risky",
        param="training_file",
        facts={"verdict": "rejected"},
    )
    world.round(3)
    job = world.job()
    assert (job.phase, job.error_code, job.error_param) == (
        "failed",
        "dataset_rejected",
        "training_file",
    )
    assert job.facts["screening"] == {"verdict": "rejected"}
    assert [stage for _, stage, _ in stages(world)] == ["validating", "screening"]
    assert job.finished_at is not None and world.runner.names() == set()


def test_faults_are_tried_again_later_each_time_and_not_for_ever(world: World) -> None:
    world.add_job()
    world.runner.script["validating"] = Report("fault", code="X", message="a worker was lost")
    starts: list[float] = []
    world.runner.on_start = lambda task: starts.append(world.now)
    world.round(60, seconds=1.0)
    assert [b - a for a, b in itertools.pairwise(starts)] == [1.0, 2.0, 4.0, 8.0]
    job = world.job()
    assert (job.phase, job.error_code) == ("failed", "internal_error")
    assert "failed 5 times, last: a worker was lost" in str(job.error_message)
    assert [outcome for _, _, outcome in stages(world)] == ["fault"] * 4 + ["exhausted"]
    assert world.runner.names() == set()


def test_after_a_fault_the_next_attempt_may_succeed(world: World) -> None:
    world.add_job()
    world.runner.script["ftjob-1:training:3"] = None  # its actor is gone
    world.runner.script["ftjob-1:training:4"] = Report("fault", message="again")
    world.round(10)
    assert world.job().phase == "succeeded"
    assert stages(world)[2:5] == [
        (3, "training", "fault"),
        (4, "training", "fault"),
        (5, "training", "done"),
    ]
    assert any("the stage's process was lost" in message for message in messages(world))


def test_what_cannot_be_had_now_is_waited_for_as_long_as_it_takes(world: World) -> None:
    world.add_job()
    world.runner.script["validating"] = Report("unavailable", message="the disk is full")
    world.round(60, seconds=10)
    assert world.job().phase == "validating" and world.job().faults == 0
    del world.runner.script["validating"]
    world.round(3, seconds=60)
    assert world.job().phase == "succeeded"


def test_a_stage_without_progress_is_ended_at_its_deadline_and_tried_again(world: World) -> None:
    world.settings = world.settings.model_copy(
        update={"stage_deadline_s": StageDeadlines(training=100.0)}
    )
    world.controller = world.make()
    world.add_job()
    for quiet_s in (0.0, 5.0):
        world.runner.script["training"] = Report("running", numbers=Numbers(quiet_s))
        world.round(9, seconds=11)
    # It took longer than its deadline, but went on meanwhile.
    assert stages(world)[-1] == (3, "training", None)
    world.runner.script["training"] = Report("running")  # what it does is not known any more
    world.round(10, seconds=11)
    assert stages(world)[2:] == [(3, "training", "fault"), (4, "training", None)]
    assert "ftjob-1:training:3" in world.runner.stopped
    assert any("no progress for 100 s" in message for message in messages(world))
    # Each attempt has its time; a new event is progress too.
    world.round(9, seconds=11)
    speaks = world.runner._events("training")
    world.runner.script["training"] = Report("running", events=speaks)
    world.round()
    world.runner.script["training"] = Report("running")
    world.round(9, seconds=11)
    assert stages(world)[-1] == (4, "training", None)
    # One that hangs each time ends the job, like any fault of the machinery.
    world.round(60, seconds=20)
    job = world.job()
    assert (job.phase, job.error_code) == ("failed", "internal_error")
    assert "last: no progress for 100 s" in str(job.error_message)


def test_while_nothing_runs_stages_jobs_wait_and_go_on(world: World) -> None:
    world.add_job()
    world.runner.down = True
    world.round(20)
    assert (world.job().phase, world.job().faults) == ("validating", 0)
    world.runner.down = False
    world.round(5)
    assert world.job().phase == "succeeded"
    assert len(world.runner.started) == len(set(world.runner.started)) == 5


def below(reason: str) -> Report:
    facts = {"passed": False, "reason": reason}
    return Report("below_gate", code="safety_gate_failed", message=reason, facts=facts)


def test_a_failed_gate_is_restored_once_and_measured_again(world: World) -> None:
    world.add_job()
    world.runner.script["ftjob-1:evaluating:4"] = below("40 % of 90 %")
    world.round(4)
    assert world.job().phase == "succeeded"
    assert [stage for _, stage, _ in stages(world)] == RESTORED_WAY
    # The second evaluation is told what the first one found.
    assert world.job().facts["before_restoring"]["reason"] == "40 % of 90 %"
    assert world.job().facts["evaluating"]["passed"] is True
    assert world.runner.names() == set()


def test_a_gate_that_fails_after_restoration_too_ends_the_job_with_both_measurements(
    lite: World,
) -> None:
    lite.add_job()
    lite.runner.script["ftjob-1:evaluating:4"] = below("40 % of 90 %")
    lite.runner.script["ftjob-1:evaluating:6"] = below("60 % of 90 %")
    lite.round(4)
    job = lite.job()
    assert (job.phase, job.error_code, job.model_id) == ("failed", "safety_gate_failed", None)
    assert [stage for _, stage, _ in stages(lite)].count("restoring") == 1
    found = [job.facts[name]["reason"] for name in ("before_restoring", "evaluating")]
    assert found == ["40 % of 90 %", "60 % of 90 %"]


def test_a_lost_restoration_is_tried_again_and_one_that_is_refused_is_not(lite: World) -> None:
    for job in ("ftjob-1", "ftjob-2"):
        lite.add_job(job)
        lite.runner.script[f"{job}:evaluating:4"] = below("40 % of 90 %")
    lite.runner.script["ftjob-1:restoring:5"] = None  # its actor is gone
    lite.runner.script["ftjob-2:restoring:5"] = Report(
        "refused", code="safety_gate_failed", message="cannot be restored: lacks 'reminder-states'"
    )
    lite.round(6)
    assert lite.job().phase == "succeeded"
    assert stages(lite)[4:6] == [(5, "restoring", "fault"), (6, "restoring", "done")]
    job = lite.job("ftjob-2")
    assert (job.phase, job.error_code) == ("failed", "safety_gate_failed")
    assert "reminder-states" in str(job.error_message)
    assert stages(lite, "ftjob-2")[-1] == (5, "restoring", "refused")


@pytest.mark.parametrize("stage", [*WAY, "restoring"])
def test_a_cancelled_stage_is_stopped_whatever_it_has_to_say(lite: World, stage: str) -> None:
    lite.add_job()
    if stage == "restoring":
        lite.runner.script["ftjob-1:evaluating:4"] = below("x")
    lite.runner.script[stage] = Report("running")
    lite.round(3)
    assert lite.job().phase == stage
    lite.change(wish="cancel", not_before=lite.now)
    del lite.runner.script[stage]  # it would be done now
    lite.round()
    job = lite.job()
    assert (job.phase, job.wish, job.lock_token) == ("cancelled", None, None)
    assert job.finished_at is not None and lite.runner.names() == set()
    assert stages(lite)[-1][2] == "cancel"
    lite.round(3)
    assert lite.job().phase == "cancelled" and lite.job().model_id is None


def test_a_cancellation_wins_over_a_model_that_was_just_stored(world: World) -> None:
    world.add_job()

    def cancel(name: str) -> None:
        if ":publishing:" in name:
            world.change(wish="cancel")

    world.runner.on_poll = cancel
    world.round(4)
    job = world.job()
    assert (job.phase, job.model_id) == ("cancelled", None)
    with world.database.system_read() as session:
        assert session.scalars(select(PublishedModel)).all() == []
    for name in ("tenants/ten_a/models/ftjob-1/a", "tenants/ten_a/models/ftjob-2/a"):
        with world.store.writer(name) as writer:
            writer.commit()
    sweep.sweep(world.settings, world.database, world.store, world.runner, world.now)
    assert list(world.store.keys("")) == ["tenants/ten_a/models/ftjob-2/a"]


@pytest.mark.parametrize("stage", [*WAY, "restoring"])
def test_a_paused_stage_gives_its_room_back_and_goes_on_later(lite: World, stage: str) -> None:
    lite.add_job()
    if stage == "restoring":
        lite.runner.script["ftjob-1:evaluating:4"] = below("x")
    lite.runner.script[stage] = Report("running")
    lite.round(3)
    lite.change(wish="pause", not_before=lite.now)
    lite.round(3)
    job = lite.job()
    assert (job.phase, job.resume_phase) == ("paused", stage)
    assert lite.runner.names() == set()
    del lite.runner.script[stage]
    lite.change(phase="submitted" if stage in WAY[:2] else "queued", not_before=lite.now)
    lite.round(4)
    assert lite.job().phase == "succeeded"
    way = RESTORED_WAY if stage == "restoring" else WAY
    assert [s for _, s, outcome in stages(lite) if outcome in ("done", "below_gate")] == way
    assert [s for _, s, outcome in stages(lite) if outcome == "pause"] == [stage]


def _wishes(world: World, first: str, then: str | None) -> None:
    """While training runs `first` is wished, and `then` while its actor is being stopped."""
    world.add_job()
    (world.settings.work / "ftjob-1").mkdir(parents=True)
    world.runner.script["training"] = Report("running")
    world.round(3)
    world.runner.on_stop = lambda name: world.change(wish=then, not_before=world.now)
    world.change(wish=first, not_before=world.now)
    world.round()
    world.runner.on_stop = lambda name: None


def test_a_cancellation_while_a_stage_is_being_paused_is_not_lost(world: World) -> None:
    _wishes(world, "pause", "cancel")
    job = world.job()
    assert (job.phase, job.wish, job.resume_phase) == ("cancelled", None, None)
    assert stages(world)[-1] == (3, "training", "cancel")
    assert job.finished_at is not None and world.runner.names() == set()
    assert not (world.settings.work / "ftjob-1").exists()


def test_a_job_that_is_resumed_while_its_stage_is_being_paused_goes_on(world: World) -> None:
    _wishes(world, "pause", None)
    assert (world.job().phase, world.job().wish) == ("training", None)
    assert stages(world)[2:] == [(3, "training", "pause"), (4, "training", None)]
    assert world.runner.names() == {"ftjob-1:training:4"}
    del world.runner.script["training"]
    world.round(3)
    assert world.job().phase == "succeeded"


def test_a_controller_that_was_away_too_long_changes_nothing(world: World) -> None:
    """It holds an expired claim while another one moves the job on: what it brings is dropped."""
    world.add_job()
    other = world.make()
    away, back = threading.Event(), threading.Event()

    def hang(task: StageTask) -> None:
        world.runner.on_start = lambda task: None
        away.set()
        assert back.wait(20)

    world.runner.on_start = hang
    world.runner.script["training"] = Report("running")
    world.now += 1
    world.controller.tick()
    assert away.wait(20)
    world.now += 31  # its claim expires
    for _ in range(12):
        world.now += 2
        other.tick()
        other.settle()
    before, done = world.job(), stages(world)
    assert before.phase == "training"
    back.set()
    world.controller.settle()  # it brings a validation that is done
    after = world.job()
    assert stages(world) == done
    assert (after.phase, after.events, after.attempt) == ("training", before.events, before.attempt)
    sweep.stop_orphans(world.database, world.runner)
    assert world.runner.names() == {f"ftjob-1:training:{after.attempt}"}
    del world.runner.script["training"]
    for _ in range(3):
        world.now += 2
        other.tick()
        other.settle()
    assert world.job().phase == "succeeded"


def test_a_heartbeat_keeps_a_long_claim(lite: World) -> None:
    lite.add_job()
    taken = lite.controller._claims.take(5)
    assert taken == {}  # it waits for room
    lite.runner.script["validating"] = Report("running")
    lite.round()
    lite.now += 1
    taken = lite.controller._claims.take(5)
    for _ in range(5):
        lite.now += 20
        lite.controller._claims.renew(taken)
        assert lite.make()._claims.take(5) == {}
    lite.now += 31
    assert list(lite.make()._claims.take(5)) == ["ftjob-1"]


def test_several_controllers_at_once_start_nothing_twice(world: World) -> None:
    for number in range(12):
        world.add_job(f"ftjob-{number}")
    controllers = [world.make() for _ in range(3)]
    for _ in range(40):
        world.now += 1
        threads = [threading.Thread(target=c.tick) for c in controllers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for controller in controllers:
        controller.settle()
    for number in range(12):
        job = f"ftjob-{number}"
        assert world.job(job).phase == "succeeded"
        assert [stage for _, stage, _ in stages(world, job)] == WAY
    assert len(world.runner.started) == len(set(world.runner.started)) == 12 * 5


def test_admission_never_gives_more_than_there_is_and_follows_weights(world: World) -> None:
    add_tenant(world.database, "ten_b", weight=3.0)
    with world.database.system() as session:
        session.add(file_row("ten_b", "file-2"))
    for number in range(20):
        for tenant, file in (("ten_a", "file-1"), ("ten_b", "file-2")):
            world.add_job(
                f"ftjob-{tenant}-{number}",
                tenant,
                training_file=file,
                phase="queued",
                created_at=number,
                facts={"validating": FACTS["validating"]},
            )
    world.runner.script["training"] = Report("running")
    world.round(3)
    assert len(world.runner.names()) == 4  # slots
    started = [name.split(":")[0] for name in world.runner.started]
    assert sum("ten_b" in name for name in started) == 3
    for name in list(world.runner.names())[:1]:
        world.change(name.split(":")[0], wish="cancel", not_before=world.now)
    world.round(3)
    assert len(world.runner.names()) == 4


def test_a_suspended_tenant_is_not_admitted_and_a_running_limit_holds(lite: World) -> None:
    for number in range(5):
        lite.add_job(f"ftjob-{number}")
    lite.runner.script["validating"] = Report("running")
    with lite.database.system() as session:
        session.get_one(Tenant, "ten_a").suspended_at = 1.0
    lite.round(3)
    assert lite.runner.names() == set()
    with lite.database.system() as session:
        tenant = session.get_one(Tenant, "ten_a")
        tenant.suspended_at, tenant.max_running_jobs = None, 2
    lite.round(3)
    assert len(lite.runner.names()) == 2


def test_a_model_or_file_that_was_taken_away_ends_the_job(lite: World) -> None:
    lite.add_job(base_model="gone")
    with lite.database.system() as session:
        session.add(file_row("ten_a", "file-2", deleted_at=1.0))
    lite.add_job("ftjob-2", training_file="file-2")
    lite.round(2)
    for job, words in (("ftjob-1", "gone is not offered"), ("ftjob-2", "file-2 is not there")):
        assert lite.job(job).phase == "failed"
        assert words in str(lite.job(job).error_message)


def test_the_sweep_removes_what_killed_processes_left(lite: World) -> None:
    day = 24 * 3600.0
    lite.now = 10 * day
    lite.add_job(phase="succeeded")
    lite.add_job("ftjob-2", phase="training", attempt=3)
    for job in ("ftjob-1", "ftjob-2"):
        (lite.settings.work / job).mkdir(parents=True)
    for name in ("old", "fresh", "deleted"):
        with lite.store.writer(f"files/{name}") as writer:
            writer.commit()
    with lite.database.system() as session:
        session.add(file_row("ten_a", "old", sha256=None, created_at=lite.now - 2 * day))
        session.add(file_row("ten_a", "fresh", sha256=None, created_at=lite.now))
        session.add(file_row("ten_a", "deleted", deleted_at=lite.now - 10))
        answer = {"tenant_id": "ten_a", "request_sha256": "", "answer": {}}
        session.add(IdempotentAnswer(key="a", created_at=lite.now - 8 * day, **answer))
        session.add(IdempotentAnswer(key="b", created_at=lite.now, **answer))
    template = StageTask.model_construct(job="x", stage="training", attempt=1)
    names = ["ftjob-1:publishing:5", "ftjob-2:training:2", "ftjob-2:training:3", "no-job:x:1"]
    lite.runner.tasks = dict.fromkeys(names, template)
    sweep.sweep(lite.settings, lite.database, lite.store, lite.runner, lite.now)
    assert lite.runner.names() == {"ftjob-2:training:3"}
    assert [path.name for path in lite.settings.work.iterdir()] == ["ftjob-2"]
    assert list(lite.store.keys("")) == ["files/fresh"]
    with lite.database.system_read() as session:
        files = {file.id: file.deleted_at for file in session.scalars(select(File))}
        assert set(files) == {"file-1", "fresh", "deleted", "old"}
        assert files["old"] == lite.now and files["fresh"] is None
        assert [row.key for row in session.scalars(select(IdempotentAnswer))] == ["b"]
    lite.now += 3 * day
    sweep.sweep(lite.settings, lite.database, lite.store, lite.runner, lite.now)
    with lite.database.system_read() as session:
        assert session.get(File, "old") is None

"""What the controller's page says of jobs and their stages, and what it never says."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from cluster.controller.actors import Host
from cluster.controller.numbers import READ_EVERY_S
from cluster.controller.runner import Numbers, Report
from cluster.controller.watch import Watch
from cluster.controller.work import WORK
from cluster.controller.workspace import Workspace
from cluster.metrics import METRICS
from cluster.state import Database
from tests.control.rows import add_tenant
from tests.control.stages import FACTS, World, stage_task

STEP = {
    "step": 3.0,
    "total_steps": 12.0,
    "loss": 2.5,
    "grad_norm": 1.5,
    "seconds": 4.0,
    "penalty/asft": 0.25,
    "asft/update_norm": 7.0,
    "asft/orthogonal_fraction": 0.5,
    "cwac/weight_drift": 1e-6,
    "cwac/weight_drift_limit": 1e-5,
}


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> World:
    return World(Database(sqlite_url), tmp_path)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is read for every page."""
    monkeypatch.setattr("cluster.controller.numbers.READ_EVERY_S", -READ_EVERY_S)


def page(world: World) -> dict[tuple[str, ...], float]:
    """Numbers by name and label values."""
    numbers = world.recorder.snapshot().numbers
    return {(name, *labels): value for (name, labels), value in numbers.items()}


def training(**numbers: Any) -> Report:
    return Report("running", numbers=Numbers(quiet_s=2.0, **{"step": STEP, **numbers}))


def test_jobs_are_counted_by_tenant_and_phase_with_the_age_of_the_oldest(world: World) -> None:
    add_tenant(world.database, "ten_b")
    world.add_job("ftjob-1", phase="queued", phase_since=400.0)
    world.add_job("ftjob-2", phase="queued", phase_since=900.0)
    world.add_job("ftjob-3", tenant="ten_b", phase="training", phase_since=990.0)
    for number, (phase, code) in enumerate(
        [("failed", "dataset_rejected"), ("failed", "dataset_rejected"), ("succeeded", None)]
    ):
        world.add_job(f"ftjob-old-{number}", phase=phase, error_code=code)
    found = page(world)
    assert found["safeft_database_up",] == 1
    assert {k[1:]: v for k, v in found.items() if k[0] == "safeft_jobs"} == {
        ("ten_a", "queued"): 2,
        ("ten_b", "training"): 1,
    }
    assert found["safeft_job_phase_age_seconds", "queued"] == 600
    assert found["safeft_job_phase_age_seconds", "training"] == 10
    verdicts = {k[1:]: v for k, v in found.items() if k[0] == "safeft_screenings_total"}
    assert verdicts == dict.fromkeys(
        [(t, v) for t in ("ten_a", "ten_b") for v in ("accepted", "rejected", "review")], 0
    )
    assert found["safeft_jobs_finished_total", "ten_a", "failed", "dataset_rejected"] == 2
    assert found["safeft_jobs_finished_total", "ten_a", "succeeded", ""] == 1


def test_a_job_that_went_all_the_way_is_counted_stage_by_stage(world: World) -> None:
    world.add_job()
    verdict = {"verdict": "accepted", "rows": 100, "risky": 3, "unscored": 1}
    scores = [0] * (len(METRICS["safeft_sqsd_score"].buckets) + 1)
    scores[4], scores[-2] = 96, 3
    numbers = Numbers(quiet_s=0.0, scores=scores, score_sum=-90.0)
    world.runner.script["screening"] = Report("done", facts=verdict, numbers=numbers)
    world.round(4)
    found = page(world)
    for stage in ("validating", "screening", "training", "evaluating", "publishing"):
        assert found["safeft_stage_attempts_total", stage, "done"] == 1
    assert found["safeft_screenings_total", "ten_a", "accepted"] == 1
    rows = {k[2]: v for k, v in found.items() if k[0] == "safeft_screened_rows_total"}
    assert rows == {"safe": 97, "risky": 2, "unscored": 1}
    assert found["safeft_trained_tokens_total", "ten_a", "tiny"] == 10
    assert found["safeft_jobs_finished_total", "ten_a", "succeeded", ""] == 1
    assert not any(name in ("safeft_jobs", "safeft_job_phase_age_seconds") for name, *_ in found)
    histograms = world.recorder.snapshot().histograms
    assert histograms["safeft_sqsd_score", ("tiny",)].counts == scores
    assert sum(histograms["safeft_stage_seconds", ("training",)].counts) == 1


def test_every_other_end_of_an_attempt_is_told_apart(world: World) -> None:
    world.add_job()
    world.runner.script["ftjob-1:validating:1"] = None  # its actor is gone
    world.runner.script["ftjob-1:validating:2"] = Report("fault", message="a defect")
    world.runner.script["ftjob-1:validating:3"] = Report("unavailable", message="disk is full")
    facts = {"verdict": "rejected", "rows": 10, "risky": 9, "unscored": 0}
    world.runner.script["screening"] = Report("refused", code="dataset_rejected", facts=facts)
    world.round(60)
    world.add_job("ftjob-2")
    world.runner.script["validating"] = Report("running")
    world.round(2)
    world.change("ftjob-2", wish="cancel")
    world.round(2)
    world.add_job("ftjob-3", base_model="not offered any more")
    world.round(2)
    found = page(world)
    attempts = {k[1:]: v for k, v in found.items() if k[0] == "safeft_stage_attempts_total"}
    assert attempts == {
        ("validating", "lost"): 1,
        ("validating", "fault"): 1,
        ("validating", "unavailable"): 1,
        ("validating", "done"): 1,
        ("screening", "refused"): 1,
        ("validating", "cancel"): 1,
        ("validating", "refused"): 1,
    }
    assert found["safeft_screenings_total", "ten_a", "rejected"] == 1
    codes = {k[2:] for k in found if k[0] == "safeft_jobs_finished_total"}
    assert codes == {("failed", "dataset_rejected"), ("cancelled", ""), ("failed", "not_available")}


def test_a_running_training_shows_its_last_step_and_takes_it_along_when_it_ends(
    world: World,
) -> None:
    world.add_job()
    world.runner.script["training"] = training()
    world.round(3)
    found = page(world)
    of = ("ten_a", "tiny")
    assert found["safeft_training_loss", *of] == 2.5
    assert found["safeft_training_progress_ratio", *of] == 0.25
    assert found["safeft_training_step_seconds", *of] == 4.0
    assert found["safeft_training_gradient_norm", *of] == 1.5
    assert found["safeft_training_penalty", *of, "asft"] == 0.25
    assert found["safeft_training_invariant_ratio", *of, "asft", "orthogonal_fraction"] == 0.5
    assert found["safeft_training_invariant_ratio", *of, "cwac", "weight_drift"] == 1e-6
    limits = [k for k in found if k[0] == "safeft_training_invariant_limit_ratio"]
    assert limits == [("safeft_training_invariant_limit_ratio", *of, "cwac", "weight_drift")]
    assert not any("update_norm" in key for key in found)  # no ratio
    assert found["safeft_stage_quiet_seconds", "training"] == 2.0
    del world.runner.script["training"]
    world.round(3)
    found = page(world)
    gone = ("safeft_stage_quiet", "safeft_training_")
    assert not [k for k in found if k[0].startswith(gone) and METRICS[k[0]].kind == "gauge"]


def test_of_two_trainings_the_one_that_stands_out_is_shown(world: World) -> None:
    for number, loss in ((1, 2.0), (2, 9.0), (3, 4.0)):
        world.add_job(f"ftjob-{number}")
        world.runner.script[f"ftjob-{number}:training:3"] = training(step={**STEP, "loss": loss})
    world.round(4)
    assert page(world)["safeft_training_loss", "ten_a", "tiny"] == 9.0


def test_what_another_controller_looks_after_now_is_not_shown_for_long(world: World) -> None:
    world.add_job()
    world.runner.script["training"] = training()
    world.round(3)
    world.now += 50.0
    found = page(world)
    assert found["safeft_stage_quiet_seconds", "training"] == pytest.approx(52.0)
    world.now += 11.0
    assert ("safeft_training_loss", "ten_a", "tiny") not in page(world)


def test_a_broken_invariant_is_shown_at_once_and_counted_at_the_end(world: World) -> None:
    world.add_job()
    world.runner.script["training"] = training(violations={"cwac": 2})
    world.round(3)
    of = ("ten_a", "tiny", "cwac")
    found = page(world)
    assert found["safeft_training_constraint_violated", *of] == 1
    assert found["safeft_training_violations_total", *of] == 0
    numbers = Numbers(quiet_s=0.0, step=STEP, violations={"cwac": 2})
    world.runner.script["training"] = Report("done", facts=FACTS["training"], numbers=numbers)
    world.round(2)
    found = page(world)
    assert found["safeft_training_violations_total", *of] == 2
    assert ("safeft_training_constraint_violated", *of) not in found


def test_a_database_that_does_not_answer_is_said_and_its_jobs_are_not_made_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add_job(phase="queued")
    assert page(world)["safeft_jobs", "ten_a", "queued"] == 1

    def fail() -> Any:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(world.database, "system_read", fail)
    found = page(world)
    assert found["safeft_database_up",] == 0
    assert ("safeft_jobs", "ten_a", "queued") not in found


def test_the_jobs_are_not_counted_for_every_page(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.controller.numbers.READ_EVERY_S", 3600.0)
    page(world)
    world.add_job(phase="queued")
    assert ("safeft_jobs", "ten_a", "queued") not in page(world)
    world.make()  # a controller that has not counted them yet
    assert page(world)["safeft_jobs", "ten_a", "queued"] == 1


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_is_quiet_until_it_gets_somewhere() -> None:
    clock = Clock()
    watch = Watch(clock)

    def after(label: str, done: int, total: int | None) -> float:
        clock.now += 10.0
        watch.progress(label, done, total)
        return watch.numbers().quiet_s

    assert after("starting workers", 1, None) == 0
    assert after("starting workers", 2, None) == 10  # seconds that were waited
    assert after("training", 0, 5) == 0
    assert after("training", 0, 5) == 10
    assert after("training", 1, 5) == 0


def test_steps_with_a_broken_invariant_are_counted_by_constraint() -> None:
    watch = Watch()
    watch.step(STEP)
    assert watch.numbers().violations == {"cwac": 0}  # it has one; it holds
    watch.step({**STEP, "cwac/weight_drift": 1.1e-5})
    watch.step({k: v for k, v in STEP.items() if "drift" not in k})  # not measured: not counted
    watch.step({**STEP, "cwac/weight_drift": float("nan")})
    numbers = watch.numbers()
    assert numbers.violations == {"cwac": 2}
    assert numbers.step["cwac/weight_drift_limit"] == 1e-5


def test_scores_are_counted_around_the_threshold() -> None:
    watch = Watch()
    watch.scored([34.0, 35.0, 35.5, 500.0, -500.0], threshold=35.0)
    numbers = watch.numbers()
    bounds = METRICS["safeft_sqsd_score"].buckets
    not_risky = sum(numbers.scores[: bounds.index(0.0) + 1])
    assert (not_risky, sum(numbers.scores)) == (3, 5)
    assert (numbers.scores[0], numbers.scores[-1]) == (1, 1)
    assert numbers.score_sum == pytest.approx(-1.0 + 0.0 + 0.5 + 465.0 - 535.0)


def test_an_actor_says_what_its_stage_measures_while_it_runs_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def train(job: Workspace) -> Report:
        job.progress("training", 3, 12)
        job.watch.step(STEP)
        stepped.set()
        assert go_on.wait(60)
        return Report("done", facts={"trained_tokens": 1})

    stepped = threading.Event()
    monkeypatch.setitem(WORK, "training", train)
    host = Host(stage_task(tmp_path).model_dump_json())
    assert stepped.wait(60)
    said = host.report(0)
    assert (said["outcome"], said["numbers"]["step"]) == ("running", STEP)
    go_on.set()
    deadline = time.monotonic() + 60
    while (said := host.report(0))["outcome"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (said["outcome"], said["numbers"]["violations"]) == ("done", {"cwac": 0})

"""Controllers are processes, and die by SIGKILL in the middle of whatever they do."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from sqlalchemy import func, select

from cluster.controller.sweep import stop_orphans
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from cluster.state.models import Job, JobEvent, PublishedModel, Stage
from tests.control.rows import add_tenant, file_row, job_row
from tests.control.stages import FileRunner

JOBS, KILLS, CONTROLLERS = 12, 4, 2
WAY = ["validating", "screening", "training", "evaluating", "publishing"]
RESTORED_WAY = [*WAY[:4], "restoring", *WAY[3:]]


def test_no_job_is_lost_and_no_stage_counts_twice_however_controllers_die(
    database: Database, tmp_path: Path
) -> None:
    stages = tmp_path / "stages"
    stages.mkdir()
    settings = Settings(
        database=database.engine.url.render_as_string(hide_password=False),
        home=tmp_path / "home",
        base_models={"tiny": BaseModelOffer(source="tiny")},
        compute_slots=4,
        intake_slots=4,
    )
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    add_tenant(database, "ten_a")
    with database.system() as session:
        session.add(file_row("ten_a", "file-1"))
        for number in range(JOBS):
            job_id = f"ftjob-{number}" if number % 3 else f"ftjob-slipped-{number}"
            session.add(job_row("ten_a", job_id, phase="submitted", request={"metadata": None}))

    def start() -> subprocess.Popen[bytes]:
        arguments = [str(tmp_path / "settings.json"), "files", str(stages)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.control.controllers", *arguments],
            cwd=Path(__file__).parent.parent.parent,
            stderr=subprocess.DEVNULL,
        )

    draw = random.Random(1)
    running = [start() for _ in range(CONTROLLERS)]
    kills, deadline = 0, time.monotonic() + 120
    done_before = 0
    try:
        while (done := _succeeded(database)) < JOBS:
            assert time.monotonic() < deadline, f"{done} of {JOBS} jobs after {kills} kills"
            # A kill each time that stages were finished, so that kills fall all over jobs' lives.
            if kills < KILLS and (stages_done := _finished_stages(database)) > done_before:
                done_before, kills = stages_done, kills + 1
                victim = draw.randrange(CONTROLLERS)
                time.sleep(draw.uniform(0.0, 0.1))
                running[victim].kill()
                running[victim].wait()
                running[victim] = start()
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert kills == KILLS
    with database.system_read() as session:
        for job in session.scalars(select(Job)):
            rows = session.scalars(
                select(Stage).where(Stage.job_id == job.id).order_by(Stage.attempt)
            ).all()
            way = RESTORED_WAY if "slipped" in job.id else WAY
            assert [row.stage for row in rows if row.outcome in ("done", "below_gate")] == way
            assert all(row.outcome in ("done", "fault", "below_gate") for row in rows)
            assert [row.attempt for row in rows] == list(range(1, len(rows) + 1))
            numbers = session.scalars(
                select(JobEvent.number).where(JobEvent.job_id == job.id).order_by(JobEvent.number)
            ).all()
            assert list(numbers) == list(range(1, job.events + 1))
        assert session.scalars(select(func.count(PublishedModel.id))).one() == JOBS
    starts = Counter((stages / "log").read_text().split())
    assert set(starts.values()) == {1}  # no name was started twice
    runner = FileRunner(stages, 0.1)
    stop_orphans(database, runner)
    assert runner.names() == set()


def _finished_stages(database: Database) -> int:
    with database.system_read() as session:
        return session.scalars(
            select(func.count(Stage.job_id)).where(Stage.outcome == "done")
        ).one()


def _succeeded(database: Database) -> int:
    with database.system_read() as session:
        failed = session.scalars(select(Job.error_message).where(Job.phase == "failed")).all()
        assert not failed, failed
        return session.scalars(select(func.count(Job.id)).where(Job.phase == "succeeded")).one()

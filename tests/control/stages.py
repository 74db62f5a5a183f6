"""Runners for tests: one in memory that follows a script, one of files that survives kills."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.artifacts import ArtifactStore, open_store
from cluster.controller.controller import Controller, Options
from cluster.controller.runner import Report, RunnerUnavailable, StageEvent, StageFile, StageTask
from cluster.metrics import Recorder
from cluster.provenance import Signed, Statement
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from cluster.state.models import Job
from cluster.tenancy.tenants import Policy
from tests.control.rows import add_tenant, file_row, job_row

FACTS: dict[str, dict[str, Any]] = {
    "validating": {"estimated_tokens": 1000},
    "screening": {"verdict": "accepted"},
    "training": {"trained_tokens": 10, "steps": 1, "final_loss": 0.1},
    "restoring": {"restored": True},
    "evaluating": {"task_loss": None, "passed": True},
}


STATEMENT = Statement(
    model="m",
    job="j",
    base_model="tiny",
    base_weights="w",
    dataset_sha256="d",
    profile="p",
    files={"adapter.bin": "0" * 64},
    facts={},
    code_version="1",
    published_at=1.0,
)
SIGNED = Signed(statement=STATEMENT.model_dump_json(), key_id="k", signature="s").model_dump()


def stage_task(home: Path) -> StageTask:
    """A first attempt at a training."""
    return StageTask(
        job="ftjob-1",
        stage="training",
        attempt=1,
        tenant="ten_a",
        tenant_name="a",
        base_model="tiny",
        request={},
        training_file=StageFile(key="f", sha256=""),
        validation_file=None,
        restores=None,
        policy=Policy(),
        facts={},
        settings=Settings(home=home, base_models={"tiny": BaseModelOffer(source="tiny")}),
    )


def facts_of(job: str, stage: str) -> dict[str, Any]:
    if stage != "publishing":
        return FACTS[stage]
    return {
        "model": f"ft:{job}",
        "kind": "adapter",
        "prefix": f"models/{job}",
        "provenance": SIGNED,
    }


class MemoryRunner:
    """Each stage is done when it is looked at, unless `script` says otherwise for it."""

    def __init__(self) -> None:
        self.tasks: dict[str, StageTask] = {}
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.script: dict[str, Report | None] = {}  # by stage, or by the actor's name
        self.down = False
        self.on_start: Callable[[StageTask], None] = lambda task: None
        self.on_poll: Callable[[str], None] = lambda name: None
        self.on_stop: Callable[[str], None] = lambda name: None

    def start(self, task: StageTask) -> None:
        self._check()
        self.on_start(task)
        if task.name not in self.tasks:
            self.tasks[task.name] = task
            self.started.append(task.name)

    def poll(self, name: str, seen: int) -> Report | None:
        self._check()
        self.on_poll(name)
        if name not in self.tasks:
            return None
        job, stage, _ = name.split(":")
        for key in (name, stage):
            if key in self.script:
                return self.script[key]
        return Report("done", facts=facts_of(job, stage), events=self._events(stage)[seen:])

    def stop(self, name: str) -> None:
        self._check()
        self.on_stop(name)
        self.stopped.append(name)
        self.tasks.pop(name, None)

    def names(self) -> set[str]:
        self._check()
        return set(self.tasks)

    def _events(self, stage: str) -> list[StageEvent]:
        return [StageEvent(message=f"{stage} speaks", data={"done": 1})]

    def _check(self) -> None:
        if self.down:
            raise RunnerUnavailable("nobody is there")


class FileRunner:
    """Stages as files: there from their start until they are stopped, done after `seconds`.

    What a job with "slipped" in its name trained is below the gate until it has been restored.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory, self.seconds = directory, seconds

    def start(self, task: StageTask) -> None:
        # Whole or absent: a controller that is killed here must not leave a stage without end.
        partial = self.directory / f"partial-{secrets.token_hex(8)}"
        partial.write_text(json.dumps(time.time()))
        try:
            os.link(partial, self.directory / task.name)
        except FileExistsError:
            return
        finally:
            partial.unlink()
        with (self.directory / "log").open("a") as log:
            log.write(f"{task.name}\n")  # short lines are appended whole

    def poll(self, name: str, seen: int) -> Report | None:
        try:
            text = (self.directory / name).read_text()
        except FileNotFoundError:
            return None
        job, stage, _ = name.split(":")
        if time.time() < json.loads(text) + self.seconds:
            return Report("running")
        events = [StageEvent(message=f"{stage} speaks")][seen:]
        if "slipped" in job and stage == "evaluating" and not self._was_restored(job):
            return Report("below_gate", facts={"passed": False}, events=events)
        return Report("done", facts=facts_of(job, stage), events=events)

    def _was_restored(self, job: str) -> bool:
        return f"{job}:restoring:" in (self.directory / "log").read_text()

    def stop(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir() if ":" in path.name}


class World:
    """A controller over a database, with a clock that only tests move."""

    def __init__(self, database: Database, home: Path, **settings: Any) -> None:
        self.database, self.now = database, 1000.0
        self.settings = Settings(
            home=home,
            base_models={"tiny": BaseModelOffer(source="tiny")},
            **{"compute_slots": 4, "intake_slots": 4, **settings},
        )
        self.store: ArtifactStore = open_store(f"file://{home}/artifacts")
        self.runner = MemoryRunner()
        self.recorder = Recorder()
        self.controller = self.make()
        add_tenant(database, "ten_a")
        with database.system() as session:
            session.add(file_row("ten_a", "file-1"))

    def make(self, **options: Any) -> Controller:
        return Controller(
            self.settings,
            self.database,
            self.store,
            self.runner,
            options=Options(claim_ttl_s=30.0, sweep_s=1e9, **options),
            recorder=self.recorder,
            clock=lambda: self.now,
        )

    def add_job(self, job_id: str = "ftjob-1", tenant: str = "ten_a", **fields: Any) -> str:
        with self.database.system() as session:
            values = {"phase": "submitted", "request": {"metadata": None}, **fields}
            session.add(job_row(tenant, job_id, **values))
        return job_id

    def job(self, job_id: str = "ftjob-1") -> Job:
        with self.database.system_read() as session:
            return session.get_one(Job, job_id)

    def change(self, job_id: str = "ftjob-1", **fields: Any) -> None:
        with self.database.system() as session:
            job = session.get_one(Job, job_id)
            for name, value in fields.items():
                setattr(job, name, value)

    def round(self, times: int = 1, seconds: float = 1.0) -> None:
        for _ in range(times):
            self.now += seconds
            self.controller.tick()
            self.controller.settle()

"""Stages of a second: no model in them, but the store, the working directory and a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from cluster.artifacts import ArtifactUnavailable, fetch, open_store, put_file
from cluster.artifacts.names import model_prefix
from cluster.controller.actors import Host
from cluster.controller.runner import Report, StageTask
from cluster.controller.watch import Watch
from safeft.cache import write_whole
from safeft.progress import Progress

STEPS = 10
MODEL_FILES = ("adapter_model.safetensors", "manifest.json", "provenance.json")
WEIGHTS_BYTES = 256 * 1024


class TinyHost(Host):
    """A stage's actor, with tiny stages in it."""

    def perform(self, task: StageTask, progress: Progress, watch: Watch) -> Report:
        try:
            return _stage(task, progress)
        except ArtifactUnavailable as error:
            return Report("unavailable", code="unavailable", message=str(error))


def log_of(home: Path) -> Path:
    """Every stage that was begun, and every one that was finished: ``begin|end NAME PID``."""
    return home / "stages.log"


def weights(job: str) -> bytes:
    """What the job's training makes, whoever makes it and however often."""
    return hashlib.shake_256(job.encode()).digest(WEIGHTS_BYTES)


def _stage(task: StageTask, progress: Progress) -> Report:
    home = task.settings.home
    _log(home, "begin", task.name)
    root = task.settings.work / task.job
    root.mkdir(parents=True, exist_ok=True)
    story = (task.request["metadata"] or {}).get("story", "plain")
    done = getattr(_Stages(task, root, progress, story), task.stage)()
    _log(home, "end", task.name)
    return done  # type: ignore[no-any-return]


def _log(home: Path, what: str, name: str) -> None:
    line = f"{what} {name} {os.getpid()}\n".encode()
    descriptor = os.open(log_of(home), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line)  # short lines are appended whole
    os.close(descriptor)


class _Stages:
    """One method for each stage."""

    def __init__(self, task: StageTask, root: Path, progress: Progress, story: str) -> None:
        self._task, self._root, self._progress, self._story = task, root, progress, story
        self._store = open_store(task.settings.artifacts_url)

    def validating(self) -> Report:
        file = self._task.training_file
        fetch(self._store, file.key, self._root / "training-file", file.sha256)
        return Report("done", facts={"rows": 1, "estimated_tokens": 1000})

    def screening(self) -> Report:
        time.sleep(0.3)
        if self._story == "poisoned":
            return Report(
                "refused",
                code="dataset_rejected",
                message="every row is risky",
                param="training_file",
                facts={"verdict": "rejected"},
            )
        return Report("done", facts={"verdict": "accepted"})

    def training(self) -> Report:
        """Goes on after the last step that was written down."""
        checkpoint = self._root / "checkpoint.json"
        step = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
        while step < STEPS:
            time.sleep(0.1)
            step += 1
            write_whole(checkpoint, json.dumps({"step": step}))
            self._progress("training", step, STEPS)
        write_whole(self._root / MODEL_FILES[0], weights(self._task.job))
        return Report("done", facts={"trained_tokens": 10, "steps": STEPS, "final_loss": 0.1})

    def evaluating(self) -> Report:
        if (self._root / MODEL_FILES[0]).read_bytes() != weights(self._task.job):
            return Report("refused", code="wrong_weights", message="these were not trained here")
        time.sleep(0.3)
        restored = self._story == "slipped" and "restoring" in self._task.facts
        good = self._story not in ("weak", "slipped") or restored
        facts: dict[str, Any] = {"task_loss": None, "passed": good}
        if not good:
            message = "The safety gate failed: refuses 1 of 9"
            return Report("below_gate", code="safety_gate_failed", message=message, facts=facts)
        return Report("done", facts=facts)

    def restoring(self) -> Report:
        """The weights stay what they are; that it was done is a fact of the job."""
        time.sleep(0.3)
        return Report("done", facts={"steps": STEPS, "final_loss": 0.1})

    def publishing(self) -> Report:
        task = self._task
        prefix = model_prefix(task.tenant, task.job)
        for name in MODEL_FILES:
            path = self._root / name
            if not path.exists():
                write_whole(path, json.dumps({"job": task.job, "file": name}))
            put_file(self._store, f"{prefix}/{name}", path)
            time.sleep(0.1)
        number = task.job.rpartition("-")[2][:12]
        model = f"ft:{task.base_model}:{task.tenant_name}::{number}"
        return Report(
            "done", facts={"model": model, "kind": "adapter", "prefix": prefix, "provenance": {}}
        )

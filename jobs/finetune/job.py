"""What the driver hands to every worker; importing it costs no DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from jobs.finetune.telemetry import StepMetrics, post
from jobs.spec import FinetuneSpec
from safeft.constraints import ProfileFiles


@dataclass(frozen=True)
class WorkerJob:
    """All that a worker is told.

    Attributes:
        rows: reference to the Arrow table of rows in Ray's object store.
        run: the run's hash.
        resume_from: a whole checkpoint of an earlier driver.
        mailbox: the actor that takes what rank 0 reports.
    """

    spec: FinetuneSpec
    rows: Any
    model_dir: Path
    profile: ProfileFiles
    run: str
    resume_from: Path | None
    mailbox: Any


def train(config: dict[str, WorkerJob]) -> list[StepMetrics]:
    """What Ray Train runs on every worker: see `jobs.finetune.worker.train`."""
    job = config["job"]
    if ray.train.get_context().get_world_rank() == 0:
        post(job.mailbox, "importing DeepSpeed")
    from jobs.finetune.worker import train as run  # not in the driver: it takes seconds

    return run(job)

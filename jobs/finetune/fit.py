"""Ray Train around the training loop: resources, retries, and what the driver sees meanwhile."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.finetune import checkpoints
from jobs.finetune.failures import StopOnOurErrors, to_safeft_error
from jobs.finetune.job import WorkerJob, train
from jobs.finetune.telemetry import MetricsLog, OnStep
from jobs.runtime import worker_environment
from jobs.spec import FinetuneSpec
from safeft.errors import SpecError, TrainingError
from safeft.progress import Progress

_POLL_S = 0.3


def run_workers(
    job: WorkerJob, output: Path, metrics: str, progress: Progress, on_step: OnStep
) -> Any:
    """Run Ray Train in a thread and pass on what rank 0 reports.

    Args:
        output: where Ray Train keeps checkpoints.
        metrics: name of the file in `output` that gets a line for each step.

    Returns:
        Ray Train's result.

    Raises:
        SpecError: the machines cannot hold the workers.
        SafeftError: what a worker raised; TrainingError for all else that went wrong.
    """
    trainer = TorchTrainer(
        train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if job.spec.distributed.use_gpu else "gloo"),
        scaling_config=_scaling(job.spec),
        run_config=ray.train.RunConfig(
            name=checkpoints.RUN_NAME,
            storage_path=str(output),
            failure_config=ray.train.FailureConfig(
                max_failures=job.spec.distributed.max_failures, controller_failure_limit=3
            ),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=job.spec.training.keep_checkpoints
            ),
            callbacks=[StopOnOurErrors()],
            worker_runtime_env={
                "env_vars": worker_environment(use_gpu=job.spec.distributed.use_gpu)
            },
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits)
            outcome.append(error)

    # Not the main thread: there, fit() takes over SIGINT for good and exits with success.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    try:
        _follow(thread, job.mailbox, MetricsLog(output / metrics), progress, on_step)
    except ray.exceptions.RayError as error:
        raise TrainingError(f"Ray was lost while training ({type(error).__name__})") from error
    finally:
        # An interrupted run ends here too: rank 0 stops when it finds nobody to report to.
        ray.kill(job.mailbox)
    if isinstance(outcome[0], BaseException):
        raise to_safeft_error(outcome[0]) from outcome[0]
    return outcome[0]


def _follow(
    thread: threading.Thread,
    mailbox: Any,
    log: MetricsLog,
    progress: Progress,
    on_step: OnStep,
) -> None:
    label, since, last = "starting training workers", time.monotonic(), None
    while True:
        running = thread.is_alive()
        for event in ray.get(mailbox.drain.remote()):
            if isinstance(event, str):
                label, since, last = event, time.monotonic(), None
            else:
                log.add(event)
                on_step(event)
                last = event
                progress("training", int(event["step"]), int(event["total_steps"]))
        if not running:
            return
        if last is None:  # a phase without steps: seconds are what moves
            progress(label, int(time.monotonic() - since), None)
        thread.join(_POLL_S)


def _scaling(spec: FinetuneSpec) -> ray.train.ScalingConfig:
    """Resources of a worker, checked against what there is: Ray would wait for ever."""
    distributed = spec.distributed
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    if distributed.use_gpu and gpus < distributed.workers:
        raise SpecError(
            f"distributed.use_gpu: {distributed.workers} workers need a GPU each, but Ray has "
            f"{gpus}; lower distributed.workers or set use_gpu to false"
        )
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    cpus = distributed.cpus_per_worker
    if cpus is None:
        share = min(nodes) / math.ceil(distributed.workers / len(nodes))
        cpus = float(math.floor(share)) if share >= 1 else share
    elif cpus > max(nodes) or cpus * distributed.workers > sum(nodes):
        raise SpecError(
            f"distributed.cpus_per_worker: {distributed.workers} workers with {cpus:g} CPUs each "
            f"do not fit; Ray has {sum(nodes):g} CPUs, at most {max(nodes):g} on one machine"
        )
    return ray.train.ScalingConfig(
        num_workers=distributed.workers,
        use_gpu=distributed.use_gpu,
        resources_per_worker={"CPU": cpus, **({"GPU": 1} if distributed.use_gpu else {})},
    )

"""Checkpoints: written by every worker, reported through Ray Train, trusted only when whole.

Each worker lists its files with their hashes in ``worker-<rank>.json``. A checkpoint is whole if
every worker's list is there and every file in it has its hash; so a checkpoint that was cut off by
a kill is recognised, whatever Ray knows about it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from jobs.finetune.telemetry import StepMetrics, read_metrics, write_metrics
from safeft.cache import sha256_file
from safeft.errors import TrainingError

RUN_NAME = "checkpoints"  # Ray Train's directory inside the output
RESUME = "resume"  # the checkpoint that an interrupted driver left, kept for the next one
_TAG = "deepspeed"
_STEPS = "steps.jsonl"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    path: Path
    step: int


def save(
    engine: Any,
    run: str,
    steps: list[StepMetrics],
    write_adapter: Callable[[Path], None] | None = None,
) -> None:
    """Write this worker's part of a checkpoint and report it; all workers call it together.

    Args:
        run: the run's hash; only the same run resumes from it.
        steps: metrics of all steps so far; the checkpoint is the state after them.
        write_adapter: at the end of the run, writes the finished adapter into a directory.
    """
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    # The working directory of a worker lies in Ray's session directory: what a kill leaves there
    # goes with it.
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=Path.cwd()))
    engine.save_checkpoint(
        str(directory), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
    )
    if rank == 0:
        write_metrics(directory / _STEPS, steps)
        if write_adapter is not None:
            write_adapter(directory)
    files = {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    listed = {"run": run, "step": len(steps), "workers": workers, "files": files}
    (directory / f"worker-{rank}.json").write_text(json.dumps(listed))
    ray.train.report(
        {"step": len(steps)},
        checkpoint=ray.train.Checkpoint.from_directory(str(directory)),
        delete_local_checkpoint_after_upload=True,
    )


def restore(engine: Any, run: str, resume_from: Path | None) -> list[StepMetrics]:
    """Load the latest checkpoint of this attempt, else the one of an earlier driver.

    Returns:
        The metrics of the steps that are done; empty: start at the beginning.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    latest = ray.train.get_checkpoint()
    if latest is None and resume_from is None:
        return []
    checkpoint = latest or ray.train.Checkpoint.from_directory(str(resume_from))
    with checkpoint.as_directory() as directory:
        if verify(Path(directory), run) is None:
            raise TrainingError(
                f"the checkpoint {checkpoint.path} is damaged; remove {RUN_NAME}/ and {RESUME}/ "
                "in the output to start over"
            )
        path, _ = engine.load_checkpoint(directory, tag=_TAG, load_module_strict=False)
        if path is None:
            raise TrainingError(f"DeepSpeed found nothing to load in {checkpoint.path}")
        return read_metrics(Path(directory) / _STEPS)


def verify(directory: Path, run: str) -> Saved | None:
    """The checkpoint in `directory` if it is whole and of this run, else None."""
    rank, workers, step = 0, 1, 0
    while rank < workers:
        try:
            listed = json.loads((directory / f"worker-{rank}.json").read_text())
            if listed["run"] != run:
                return None
            whole = all(sha256_file(directory / n) == sha for n, sha in listed["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # missing, cut off, or not a list of ours
        if not whole:
            return None
        rank, workers, step = rank + 1, listed["workers"], listed["step"]
    return Saved(directory, step)


def salvage(output: Path, run: str) -> Saved | None:
    """Keep the best checkpoint that earlier drivers of this run left in `output`, and only that.

    Afterwards Ray Train's directory is gone: its own record may name checkpoints that a kill cut
    off, and holds no claim on those it had not registered yet.
    """
    candidates = [output / RESUME]
    if (output / RUN_NAME).is_dir():
        candidates += sorted((output / RUN_NAME).iterdir())
    whole = [found for path in candidates if path.is_dir() and (found := verify(path, run))]
    best = max(whole, key=lambda saved: saved.step, default=None)
    kept = output / RESUME
    if best is not None and best.path != kept:
        if kept.exists():
            shutil.rmtree(kept)
        best.path.rename(kept)
        best = Saved(kept, best.step)
    discard(output, resume=best is None)
    return best


def discard(output: Path, *, resume: bool) -> None:
    """Remove Ray Train's directory, and the kept checkpoint too where `resume` says so."""
    for name in (RUN_NAME, RESUME) if resume else (RUN_NAME,):
        if (output / name).exists():
            shutil.rmtree(output / name)


def finished_adapter(directory: Path, run: str) -> list[Path]:
    """The adapter's files in the last checkpoint of a finished run.

    Raises:
        TrainingError: the checkpoint is damaged or holds none.
    """
    files = [directory / name for name in ADAPTER_FILES]
    if verify(directory, run) is None or not all(file.exists() for file in files):
        raise TrainingError(f"{directory}: the finished run left no whole adapter; run it again")
    return files

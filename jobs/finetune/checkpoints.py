"""Checkpoints: written by every worker, reported through Ray Train, trusted only when whole.

Each worker lists its files with their hashes in ``worker-<rank>.json``. A checkpoint is whole if
every worker's list is there and every file in it has its hash; so a checkpoint that was cut off by
a kill is recognised, whatever Ray knows about it. It holds what training changes (`state.py`), and
at the end of the run the finished weights too; any number of workers goes on from it.
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
import torch
import torch.distributed

from jobs.finetune.state import load_state, save_state
from jobs.finetune.telemetry import StepMetrics, read_metrics, write_metrics
from safeft.cache import sha256_file
from safeft.errors import TrainingError

RUN_NAME = "checkpoints"  # Ray Train's directory inside the output
RESUME = "resume"  # the checkpoint that an interrupted driver left, kept for the next one
_STEPS = "steps.jsonl"
_FINISHED = "finished"  # directory of the finished weights


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    path: Path
    step: int


def save(
    engine: Any,
    run: str,
    steps: list[StepMetrics],
    write_finished: Callable[[Path], None] | None = None,
) -> None:
    """Write this worker's part of a checkpoint and report it; all workers call it together.

    Args:
        run: the run's hash; only the same run resumes from it.
        steps: metrics of all steps so far; the checkpoint is the state after them.
        write_finished: at the end of the run, writes the finished weights into a directory.
    """
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    # The working directory of a worker lies in Ray's session directory: what a kill leaves there
    # goes with it.
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=Path.cwd()))
    save_state(engine, directory, rank)
    if rank == 0:
        write_metrics(directory / _STEPS, steps)
        if write_finished is not None:
            (directory / _FINISHED).mkdir()
            write_finished(directory / _FINISHED)
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

    It may be of another number of workers; the constraints' W0 is not in it.

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
        if not _whole(engine, Path(directory), run):
            raise TrainingError(
                f"the checkpoint {checkpoint.path} is damaged; remove {RUN_NAME}/ and {RESUME}/ "
                "in the output to start over"
            )
        load_state(engine, Path(directory))
        return read_metrics(Path(directory) / _STEPS)


def verify(directory: Path, run: str, share: int = 0, shares: int = 1) -> Saved | None:
    """The checkpoint in `directory` if it is whole and of this run, else None.

    Of `shares` callers that divide the hashing, this is number `share`.
    """
    rank, workers, step = 0, 1, 0
    while rank < workers:
        try:
            listed = json.loads((directory / f"worker-{rank}.json").read_text())
            if listed["run"] != run:
                return None
            mine = list(listed["files"].items())[share::shares]
            whole = all(sha256_file(directory / name) == sha for name, sha in mine)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # missing, cut off, or not a list of ours
        if not whole:
            return None
        rank, workers, step = rank + 1, listed["workers"], listed["step"]
    return Saved(directory, step)


def _whole(engine: Any, directory: Path, run: str) -> bool:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = torch.tensor(int(verify(directory, run, rank, world) is not None), device=engine.device)
    torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MIN)
    return bool(whole)


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


def finished_files(directory: Path, run: str) -> list[Path]:
    """The finished weights in the last checkpoint of a finished run.

    Raises:
        TrainingError: the checkpoint is damaged or holds none.
    """
    files = sorted((directory / _FINISHED).glob("*"))
    if verify(directory, run) is None or not files:
        raise TrainingError(f"{directory}: the finished run left no whole weights; run it again")
    return files

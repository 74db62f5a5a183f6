"""What a running worker tells the driver, through one small actor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray

from safeft.cache import write_whole
from safeft.errors import TrainingError

StepMetrics = dict[str, float]  # "step" counts from 1
OnStep = Callable[[StepMetrics], None]  # told of each step, in order


class _Mailbox:
    """Holds events until the driver fetches them: a status text, or the metrics of one step."""

    def __init__(self) -> None:
        self._events: list[str | StepMetrics] = []

    def post(self, event: str | StepMetrics) -> None:
        self._events.append(event)

    def drain(self) -> list[str | StepMetrics]:
        events, self._events = self._events, []
        return events


Mailbox: Any = ray.remote(num_cpus=0)(_Mailbox)


def post(mailbox: Any, event: str | StepMetrics) -> None:
    """Deliver an event.

    Raises:
        TrainingError: nobody is there any more; the run was interrupted and has to end.
    """
    try:
        ray.get(mailbox.post.remote(event))
    except ray.exceptions.RayActorError as error:
        raise TrainingError("the run was interrupted") from error


def unheard(metrics: StepMetrics) -> None:
    """Steps that nobody watches; they are in ``metrics.jsonl`` all the same."""


class MetricsLog:
    """``metrics.jsonl``: one line a step. A step that is done again after a resume replaces it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps = {int(metrics["step"]): metrics for metrics in read_metrics(path)}

    def add(self, metrics: StepMetrics) -> None:
        """Append one step; later steps that are known from before a resume are dropped."""
        step = int(metrics["step"])
        if any(known >= step for known in self._steps):
            kept = [known for number, known in self._steps.items() if number < step]
            write_metrics(self._path, [*kept, metrics])
            self._steps = {int(known["step"]): known for known in [*kept, metrics]}
            return
        self._steps[step] = metrics
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(metrics))


def read_metrics(path: Path) -> list[StepMetrics]:
    """The metrics in a file; a last line that a killed process left unfinished is not there."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_metrics(path: Path, steps: Iterable[StepMetrics]) -> None:
    """Replace the file in one go."""
    write_whole(path, "".join(_line(metrics) for metrics in steps))


def _line(metrics: StepMetrics) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"

"""A job's way through its phases: what was, what is, what is to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.controller.phases import COMPUTE, FINAL, INTAKE, STAGES, WAITING
from cluster.state.models import Job, Stage

#: Where a job goes that nothing stops.
PATH = (
    *("submitted", "validating", "screening", "queued"),
    *("training", "evaluating", "publishing", "succeeded"),
)

_PLACE = {phase: place for place, phase in enumerate(PATH, 1)}
_PLACE["restoring"] = _PLACE["training"]  # the model is measured again afterwards

_STOPS = ("refused", "exhausted", "below_gate", "cancel")


@dataclass(frozen=True)
class Step:
    """One entry of the timeline.

    Attributes:
        begin, end: None where it did not begin or end yet.
        attempts: how often a stage was begun in a row.
        outcome: of the last attempt.
    """

    phase: str
    state: Literal["past", "now", "to come"]
    begin: float | None = None
    end: float | None = None
    attempts: int = 0
    outcome: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether the job ended here otherwise than it was meant to."""
        return self.phase in ("failed", "cancelled") or self.outcome in _STOPS


def timeline(job: Job, stages: Sequence[Stage]) -> list[Step]:
    """The steps of a job in order; `stages` are its attempts, in order."""
    runs = _runs(stages)
    first = runs[0].begin if runs else None
    steps = [Step("submitted", "past", job.created_at, first)]
    for run in runs:
        before = steps[-1]
        if run.phase in COMPUTE and before.phase in INTAKE:
            steps.append(Step("queued", "past", before.end, run.begin))
        steps.append(run)
    if job.phase in FINAL:
        steps[-1] = replace(steps[-1], end=steps[-1].end or job.finished_at)
        return [*steps, Step(job.phase, "past", job.finished_at)]
    if job.phase != steps[-1].phase:
        steps.append(Step(job.phase, "now", job.phase_since))
    steps[-1] = replace(steps[-1], state="now", end=None)
    return [*steps, *(Step(phase, "to come") for phase in _to_come(job))]


def reached(job: Job) -> int:
    """How many phases of the usual way the job is past or in, of `len(PATH)`."""
    waits_before = job.resume_phase if job.phase in ("paused", "awaiting_review") else None
    return _PLACE.get(waits_before or job.phase, 0)


def _to_come(job: Job) -> tuple[str, ...]:
    if job.phase in WAITING and job.resume_phase in STAGES:
        return (job.resume_phase, *PATH[_PLACE[job.resume_phase] :])
    return PATH[reached(job) :]


def _runs(stages: Sequence[Stage]) -> list[Step]:
    """Attempts at the same stage, one after the other, are one step."""
    runs: list[Step] = []
    for stage in stages:
        step = Step(stage.stage, "past", stage.started_at, stage.ended_at, 1, stage.outcome)
        if runs and runs[-1].phase == stage.stage:
            earlier = runs.pop()
            step = replace(step, begin=earlier.begin, attempts=earlier.attempts + 1)
        runs.append(step)
    return runs

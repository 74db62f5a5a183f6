"""What the controller asks of whatever runs the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from cluster.settings import Settings
from cluster.tenancy.tenants import Policy
from safeft.errors import SafeftError

ReportOutcome = Literal[
    "running", "done", "refused", "below_gate", "review", "fault", "unavailable"
]


class RunnerUnavailable(SafeftError):
    """Whatever runs the stages does not answer; the stages may be running all the same."""


class StageFile(BaseModel):
    """An uploaded file that a stage reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    sha256: str


class StageModel(BaseModel):
    """A published model that a stage reads: its name, and each of its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    files: dict[str, StageFile]


class StageTask(BaseModel):
    """One attempt at one stage of a job, with all that it needs to know.

    Attributes:
        restores: the published model that the job restores; None: one that tunes its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    job: str
    stage: str
    attempt: int
    tenant: str
    tenant_name: str
    base_model: str
    request: dict[str, Any]
    training_file: StageFile
    validation_file: StageFile | None
    restores: StageModel | None
    policy: Policy
    facts: dict[str, Any]
    settings: Settings

    @property
    def name(self) -> str:
        """Of its actor; no other ever has it."""
        return actor_name(self.job, self.stage, self.attempt)


class StageEvent(BaseModel):
    """Something that a tenant may want to read."""

    message: str
    data: dict[str, Any] = {}


@dataclass(frozen=True)
class Numbers:
    """What a stage has measured since it began, for the metrics page.

    Attributes:
        quiet_s: since it last got anywhere.
        step: the latest value of all that training says of its steps; empty: it does not train.
        violations: by constraint with exact invariants, the steps in which one was broken.
        scores: SQSD of a screened dataset's rows less the threshold, counted in the buckets of
            `safeft_sqsd_score`; empty: it did not screen. ``score_sum``: their sum.
    """

    quiet_s: float
    step: dict[str, float] = field(default_factory=dict)
    violations: dict[str, int] = field(default_factory=dict)
    scores: list[int] = field(default_factory=list)
    score_sum: float = 0.0


@dataclass(frozen=True)
class Report:
    """What an actor says.

    Attributes:
        events: those after the ones that were asked for.
        facts: what it found, once it is done (or below the gate, or left to a person).
        code, message, param: of the error, where there is one.
        numbers: None: it cannot say.
    """

    outcome: ReportOutcome
    events: list[StageEvent] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    message: str = ""
    param: str | None = None
    numbers: Numbers | None = None


class StageRunner(Protocol):
    """Starts stages that outlive the controller, and finds them again. Safe to share by threads."""

    def start(self, task: StageTask) -> None:
        """Start the stage under the task's name; where there is one already, leave it."""
        ...

    def poll(self, name: str, seen: int) -> Report | None:
        """What the stage says, with its events from number `seen`; None: it is gone."""
        ...

    def stop(self, name: str) -> None:
        """End the stage and all that it started; one that is not there is fine."""
        ...

    def names(self) -> set[str]:
        """Every stage that is there."""
        ...


def actor_name(job: str, stage: str, attempt: int) -> str:
    """``job:stage:attempt``."""
    return f"{job}:{stage}:{attempt}"

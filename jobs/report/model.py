"""What the report shows, and the checks that keep it from comparing what does not compare."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    model_validator,
)

from jobs.evaluation import COMPARABLE, Evaluation
from jobs.verdict import Verdict
from safeft.screen_policy import ScreenPolicy, is_risky

Text = Annotated[str, Field(min_length=1)]


def _nan_is_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


MaybeFloat = Annotated[FiniteFloat | None, BeforeValidator(_nan_is_none)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProfileSummary(_Part):
    """The parts of the safety profile that explain a verdict.

    Attributes:
        policy: that the datasets were judged by.
        calibration: SQSD of the rows that the threshold was set on, by class.
    """

    policy: ScreenPolicy
    calibration: dict[Text, list[FiniteFloat]]


class ScoredRow(_Part):
    """One row of ``rows.parquet`` (`jobs.screening.blocks.SCORE_SCHEMA`); NaN is read as None."""

    index: int
    file: str = ""
    line: int
    score: MaybeFloat
    danger: MaybeFloat
    safety: MaybeFloat
    tokens: int
    trained: int
    error: str | None = None

    @model_validator(mode="after")
    def _scored_or_error(self) -> Self:
        if (self.score is None) != (self.error is not None):
            raise ValueError(f"line {self.line}: needs either a score or an error")
        return self


class TenantReport(_Part):
    """One tenant's dataset and what screening made of it.

    Attributes:
        dataset: the file's name, as people know it.
        planted: lines that are known to be poisoned; None where nobody knows.
        excerpts: text of the user's turn by line; shown for risky rows only, folded.
    """

    name: Text
    dataset: Text
    verdict: Verdict
    scores: list[ScoredRow]
    planted: list[int] | None = None
    excerpts: dict[int, str] = {}

    @property
    def flagged(self) -> set[int]:
        """The lines that are risky under the verdict's policy."""
        return {row.line for row in self.scores if is_risky(row.score, self.verdict.policy)}

    @model_validator(mode="after")
    def _verdict_is_on_these_rows(self) -> Self:
        lines = {row.line for row in self.scores}
        if not len(lines) == len(self.scores) == self.verdict.rows:
            raise ValueError(
                f"{self.name}: the verdict is on {self.verdict.rows} rows, but {len(self.scores)} "
                f"scores on {len(lines)} lines are given"
            )
        if len(self.flagged) != self.verdict.risky:
            raise ValueError(f"{self.name}: the verdict counts other risky rows than the scores do")
        for what, used in (
            ("a risky row", {row.line for row in self.verdict.risky_rows}),
            ("a planted row", set(self.planted or ())),
        ):
            if foreign := sorted(used - lines):
                raise ValueError(f"{self.name}: {what}, line {foreign[0]}, has no score")
        return self


class CurvePoint(_Part):
    """One optimizer step. `penalty` is None where no constraint adds one to the loss."""

    step: int
    loss: FiniteFloat
    penalty: FiniteFloat | None = None


class ArmReport(_Part):
    """One fine-tuning run and what was measured on its result.

    Attributes:
        name: what sets it apart, such as "benign data, AsFT"; unique.
        tenant: `TenantReport.name` of the data.
        constraint: the constraint's name; None: plain fine-tuning.
        seconds: of training.
        gate_reason: one sentence.
    """

    name: Text
    tenant: str
    constraint: str | None = None
    curve: list[CurvePoint]
    evaluation: Evaluation
    seconds: NonNegativeFloat
    gate_passed: bool
    gate_reason: Text


class ChatExample(_Part):
    """One question, and each model's answer to it."""

    question: Text
    answers: dict[Text, str]


class ServedModel(_Part):
    """An arm's model behind the safety gate, at the end of its first round of probes.

    Attributes:
        name: that it was served under.
        arm: `ArmReport.name`.
        state: of the gate.
        reason: why it is in that state, in the gate's words.
        seconds: from its registration to that state.
        harmful, benign: probes that were refused, and all that were answered.
        answer: to `DemoReport.chat`'s question over the API; None: the API refused.
        error: the API's words where it refused.
    """

    name: Text
    arm: Text
    state: Text
    reason: str
    seconds: NonNegativeFloat
    harmful: tuple[int, int]
    benign: tuple[int, int]
    answer: str | None = None
    error: str | None = None


class DemoReport(_Part):
    """Everything on the page.

    Attributes:
        created: when the run ended.
        machine: processor, cores, memory and system, in words.
        versions: of libraries, by name.
        model: source string of the model that tenants tune.
        seconds: the whole run.
        commands: shell lines that repeat the run and its parts.
        baseline: the model before any training.
    """

    title: Text
    created: datetime
    machine: Text
    versions: dict[str, str]
    seed: int
    model: Text
    seconds: NonNegativeFloat
    commands: list[str]
    profile: ProfileSummary
    tenants: Annotated[list[TenantReport], Field(min_length=1)]
    baseline: Evaluation
    arms: list[ArmReport]
    served: list[ServedModel] = []
    chat: ChatExample | None = None

    @model_validator(mode="after")
    def _names(self) -> Self:
        tenants = [tenant.name for tenant in self.tenants]
        for what, names in (("tenant", tenants), ("arm", [arm.name for arm in self.arms])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two {what}s are called {twice[0]!r}")
        for arm in self.arms:
            if arm.tenant not in tenants:
                raise ValueError(f"arm {arm.name!r}: there is no tenant {arm.tenant!r}")
        for model in self.served:
            if model.arm not in {arm.name for arm in self.arms}:
                raise ValueError(f"served model {model.name!r}: there is no arm {model.arm!r}")
        return self

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        for tenant in self.tenants:
            if tenant.verdict.policy != self.profile.policy:
                raise ValueError(f"{tenant.name}: the verdict was made under another policy")
        return self

    @model_validator(mode="after")
    def _evaluations_compare(self) -> Self:
        before = self.baseline.bound
        for arm in self.arms:
            after = arm.evaluation.bound
            for key in COMPARABLE:
                if before.get(key) != after.get(key):
                    raise ValueError(
                        f"arm {arm.name!r}: its evaluation has another {key} than the baseline's"
                    )
            held_out = before.get("held_out"), after.get("held_out")
            if None not in held_out and held_out[0] != held_out[1]:
                raise ValueError(
                    f"arm {arm.name!r}: its task loss is on other held-out rows than the baseline's"
                )
        return self

"""What a job's stages found, as the pages show it. Whatever was not recorded is unknown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.provenance import ProvenanceError, PublicKey, Signed, Statement
from safeft.evaluate import Rate


@dataclass(frozen=True)
class Refusals:
    """Refusal rates on one prompt set; None: not measured. Shares in [0, 1]."""

    prompts: str
    rates: list[Rate | None]


@dataclass(frozen=True)
class Measured:
    """The evaluation: one column for each time that the model was measured."""

    columns: list[str]
    rows: list[Refusals]
    passed: bool | None
    reason: str | None
    task_loss: float | None


class RiskyRow(BaseModel):
    """One line of the dataset above the threshold, or without a score."""

    file: str = ""
    line: int
    score: float | None = None
    error: str | None = None


class Screening(BaseModel):
    """As much of a verdict as was recorded."""

    verdict: str
    reason: str | None = None
    rows: int | None = None
    risky: int | None = None
    unscored: int | None = None
    dropped: int | None = None
    risky_rows: list[RiskyRow] = []
    data_sha256: str | None = None
    profile: str | None = None


def screening_of(facts: dict[str, Any]) -> Screening | None:
    """The verdict on the dataset; None before there is one."""
    return Screening.model_validate(facts["screening"]) if "screening" in facts else None


def evaluation_of(facts: dict[str, Any]) -> Measured | None:
    """Refusals before and after, and after training alone where the model was restored since."""
    last = facts.get("evaluating")
    if last is None:
        return None
    measured = [("Before training", last.get("before"))]
    if "before_restoring" in facts:
        earlier = facts["before_restoring"].get("after")  # none where a served model was restored
        measured += [("After training", earlier)] if earlier else []
        measured.append(("After restoring", last.get("after")))
    else:
        measured.append(("After training", last.get("after")))
    sets = list(dict.fromkeys(name for _, rates in measured for name in rates or {}))
    return Measured(
        columns=[column for column, _ in measured],
        rows=[
            Refusals(name, [_rate((rates or {}).get(name)) for _, rates in measured])
            for name in sets
        ],
        passed=last.get("passed"),
        reason=last.get("reason"),
        task_loss=last.get("task_loss"),
    )


def _rate(found: dict[str, Any] | None) -> Rate | None:
    return Rate(found["refused"], found["asked"]) if found and found["asked"] else None


@dataclass(frozen=True)
class Provenance:
    """What the publisher said about a model.

    Attributes:
        problem: why it cannot be trusted; None: this control plane's key signed exactly this.
    """

    statement: Statement
    key_id: str
    problem: str | None


def provenance_of(recorded: dict[str, Any], key: PublicKey) -> Provenance | None:
    """The recorded statement, its signature checked; None where there is none to read."""
    try:
        signed = Signed.model_validate(recorded)
        statement = Statement.model_validate_json(signed.statement)
    except ValidationError:
        return None
    problem = None
    try:
        key.check(signed)
    except ProvenanceError as error:
        problem = str(error)
    return Provenance(statement, signed.key_id, problem)

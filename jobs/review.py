"""A person's decision on a dataset that screening left to one, bound to that very verdict."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.policy import Text
from jobs.verdict import Verdict, read_verdict
from safeft.cache import write_whole
from safeft.errors import DatasetRejected, DatasetUnderReview, InputError


class Decision(BaseModel):
    """Who decided what about one verdict, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    decision: Literal["accepted", "rejected"]
    reviewer: Text
    reason: Text
    verdict_sha256: str
    decided: datetime


def record_decision(
    directory: Path, decision: Literal["accepted", "rejected"], reviewer: str, reason: str
) -> Decision:
    """Write the decision on the verdict in a screening directory; an older one is replaced.

    Raises:
        InputError: there is no verdict, it waits for nobody, or a text is empty.
    """
    verdict = read_verdict(directory)
    if verdict.verdict != "review":
        raise InputError(f"{directory}: the dataset was {verdict.verdict}; no review is open")
    if not reviewer.strip() or not reason.strip():
        raise InputError("a review needs a reviewer's name and a reason")
    made = Decision(
        decision=decision,
        reviewer=reviewer.strip(),
        reason=reason.strip(),
        verdict_sha256=verdict.digest(),
        decided=datetime.now(UTC),
    )
    write_whole(_file(directory, verdict), made.model_dump_json(indent=1))
    return made


def read_decision(directory: Path, verdict: Verdict) -> Decision | None:
    """The decision on this verdict; None: nobody has decided.

    Raises:
        InputError: there is one that cannot be read or that is on another verdict.
    """
    path = _file(directory, verdict)
    if not path.exists():
        return None
    try:
        decision = Decision.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise InputError(f"{path} is no review decision; remove it and review again") from None
    if decision.verdict_sha256 != verdict.digest():
        raise InputError(f"{path} is on another verdict; remove it and review again")
    return decision


def is_accepted(verdict: Verdict, review: Decision | None) -> bool:
    """Whether what is trained on the dataset may be published."""
    if verdict.verdict == "review":
        return review is not None and review.decision == "accepted"
    return verdict.verdict == "accepted"


def require_accepted(
    data: Path, verdict: Verdict, where: Path, review: Decision | None = None
) -> None:
    """Pass only what may be trained on: accepted data, or reviewed data that a person accepted.

    Raises:
        DatasetRejected, DatasetUnderReview: it may not, or not yet.
    """
    if verdict.verdict == "rejected":
        raise DatasetRejected(f"{data}: rejected, {verdict.reason}; row scores are in {where}")
    if verdict.verdict == "review":
        if review is None:
            raise DatasetUnderReview(
                f"{data}: {verdict.reason}; it waits for a decision: "
                f"`safeft review {where} --accept|--reject --reviewer NAME --reason WHY`"
            )
        if review.decision == "rejected":
            raise DatasetRejected(f"{data}: rejected by {review.reviewer}: {review.reason}")


def _file(directory: Path, verdict: Verdict) -> Path:
    return directory / f"review-{verdict.digest()[:16]}.json"

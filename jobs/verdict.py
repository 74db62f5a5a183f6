"""The verdict on a dataset: a policy applied to its rows' scores, and what it is bound to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from safeft import __version__
from safeft.errors import InputError, MeasurementError
from safeft.profile import ScreenPolicy


class RiskyRow(BaseModel):
    """One row above the threshold, or without a score."""

    model_config = ConfigDict(extra="forbid")
    line: int
    score: float | None = None
    error: str | None = None


class Verdict(BaseModel):
    """What screening decided about one dataset, and what the decision is bound to."""

    model_config = ConfigDict(extra="forbid")
    verdict: Literal["accepted", "rejected"]
    rows: int
    risky: int
    unscored: int
    risky_rows: list[RiskyRow]
    row_threshold: float
    max_risky_fraction: float
    min_risky_rows: int
    data_sha256: str
    rows_sha256: str
    profile: str
    code_version: str = __version__

    @property
    def reason(self) -> str:
        """The verdict in one sentence."""
        share = f"{self.risky} of {self.rows} rows ({self.risky / self.rows:.1%}) are risky"
        if self.unscored:
            return f"{share}, {self.unscored} of them without a score, which none may be"
        return (
            f"{share}; a dataset is rejected from {self.min_risky_rows} risky rows and "
            f"above {self.max_risky_fraction:.1%}"
        )


def decide(scores: Iterable[dict[str, Any]], policy: ScreenPolicy, **bound: Any) -> Verdict:
    """Apply a policy to row scores. A row without a finite score is unknown: never accepted.

    Raises:
        MeasurementError: there are no scores at all.
    """
    rows = list(scores)
    if not rows:
        raise MeasurementError("screening scored no rows; nothing can be accepted")
    unscored = [s for s in rows if s["error"] is not None or not math.isfinite(s["score"])]
    scored = [s for s in rows if s["error"] is None and math.isfinite(s["score"])]
    above = sorted(
        (s for s in scored if s["score"] > policy.row_threshold), key=lambda s: -s["score"]
    )
    rejected = (
        bool(unscored)
        or len(above) == len(rows)
        or (
            len(above) >= policy.min_risky_rows
            and len(above) > policy.max_risky_fraction * len(rows)
        )
    )
    return Verdict(
        verdict="rejected" if rejected else "accepted",
        rows=len(rows),
        risky=len(above) + len(unscored),
        unscored=len(unscored),
        risky_rows=[
            *(RiskyRow(line=s["line"], error=s["error"] or "no score") for s in unscored),
            *(RiskyRow(line=s["line"], score=s["score"]) for s in above),
        ],
        row_threshold=policy.row_threshold,
        max_risky_fraction=policy.max_risky_fraction,
        min_risky_rows=policy.min_risky_rows,
        **bound,
    )


def read_verdict(directory: Path) -> Verdict:
    """The verdict in a screening directory.

    Raises:
        InputError: there is none, or it does not parse.
    """
    path = directory / "verdict.json"
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `safeft screen` first") from None
    except ValueError:
        raise InputError(f"{path} is not a screening verdict") from None


def read_scores(directory: Path) -> list[dict[str, Any]]:
    """The row scores in a screening directory, in the dataset's order."""
    table = pq.read_table(directory / "rows.parquet")
    return sorted(table.to_pylist(), key=lambda s: s["index"])

"""What the report of one screening holds: the page is made from it, and it is the report's JSON."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from jobs.verdict import Verdict

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModuleShare(_Part):
    """What one module adds to a row's score: its danger cosine minus its safety cosine."""

    name: Text
    score: FiniteFloat


class KnownPrompt(_Part):
    """A harmful prompt that is part of safeft, and how much of it a row holds."""

    prompt: Text
    share: Share


class FlaggedRow(_Part):
    """A risky row: how it scored, and what the tenant needs to find and judge it.

    Attributes:
        text: the whole chat, a line a turn, cut after some characters.
        modules: those that add most, highest first; None: not computed.
        holds: the known harmful prompt that it holds most of.
    """

    index: Count
    file: str
    line: int
    score: FiniteFloat | None
    danger: FiniteFloat | None
    safety: FiniteFloat | None
    tokens: Count
    trained: Count
    error: str | None
    text: str
    modules: list[ModuleShare] | None = None
    holds: KnownPrompt | None = None


class Group(_Part):
    """Rows that are nearly the same: how many, how many repeat another one exactly, how many are
    risky, and the lines of some; ``files``: of each line its file, where a dataset has several.
    """

    size: Count
    exact: Count
    risky: Count
    lines: list[int]
    files: list[str]


class Bucket(_Part):
    """Rows of one kind: a script of writing, or a span of lengths."""

    name: Text
    rows: Count
    risky: Count


class Duplicates(_Part):
    """Repetition within the dataset, among the first ``compared`` rows.

    Attributes:
        repeated: rows that are an earlier one again, but for case, punctuation and spacing.
        groups: of near-duplicates, the largest first; ``group_count`` counts all of them.
        holding: rows that hold a harmful prompt known to safeft; ``holding_unflagged`` of them
            are not risky by their score, and ``unflagged`` shows some of those.
    """

    compared: Count
    repeated: Count
    group_count: Count
    grouped_rows: Count
    groups: list[Group]
    holding: Count
    holding_unflagged: Count
    unflagged: list[FlaggedRow]


class ErrorRate(_Part):
    """How often the profile's policy is wrong about mixtures of reference rows."""

    rows: Count
    poisoned: Share
    rate: Share
    low: Share
    high: Share


class ScreenReport(_Part):
    """Everything on the page.

    Attributes:
        dataset: the file's name, as people know it.
        model: source string of the base model.
        calibration: SQSD of the profile's reference rows, by class.
        errors: None where the profile was calibrated before they were measured.
        scores: of all scored rows, or of evenly spaced ones if there are too many to draw.
        riskiest: risky rows, worst first, as many as are shown.
        without: the verdict on what is left when the risky rows are set aside.
    """

    format: Literal["safeft.screen-report.1"] = "safeft.screen-report.1"
    dataset: Text
    created: datetime
    model: Text
    verdict: Verdict
    calibration: dict[Text, list[FiniteFloat]]
    errors: list[ErrorRate] | None
    scores: list[FiniteFloat]
    riskiest: list[FlaggedRow]
    without: Verdict
    lengths: list[Bucket]
    scripts: list[Bucket]
    mixed_scripts: Count
    duplicates: Duplicates

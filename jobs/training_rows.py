"""Which rows a job trains on, and how much each counts: what screening let through, and what the
spec makes of the scores.

Scores come from the screening of these very rows: the verdict is bound to their tokens, and what
was set aside to the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from jobs.own_rows import counted, own_rows
from jobs.spec import DataSpec, FinetuneSpec
from jobs.verdict import Verdict, kept_indices, known_score, read_scores
from safeft.data import TokenisedRow
from safeft.errors import InputError, ProfileError
from safeft.profile import REBUILD, SafetyProfile
from safeft.screen_policy import is_risky


@dataclass(frozen=True)
class TrainingRows:
    """Rows with the factor that each one's loss is multiplied with; None: all count alike.

    ``data``: the spec's, with the numbers of own rows in place of ``auto``.
    """

    rows: list[TokenisedRow]
    weights: list[float] | None
    data: DataSpec


def training_rows(
    spec: FinetuneSpec,
    rows: Sequence[TokenisedRow],
    verdict: Verdict,
    screening: Path,
    profile: SafetyProfile,
    model_dir: Path,
) -> TrainingRows:
    """What a job trains on.

    ``training.risk_weighting``: ``drop`` leaves risky rows out where the verdict did not;
    ``downweight`` weighs each row by `risk_weight`, and leaves out those that it gives nothing.

    Args:
        rows: the whole dataset, as it was screened; ``screening`` is the screening's directory.

    Raises:
        InputError: no row is left, or the scores are not those of the verdict.
        ProfileError: the profile lacks what the spec needs.
    """
    kept = kept_indices(screening, verdict)
    indices = range(len(rows)) if kept is None else kept
    how = spec.training.risk_weighting
    if how == "none":
        return _with_own([rows[i] for i in indices], None, spec, profile, model_dir)
    scores = [known_score(one) for one in read_scores(screening)]
    if len(scores) != len(rows):
        raise InputError(f"{screening} holds the screening of other data; screen it again")
    if how == "drop":
        indices = [i for i in indices if not is_risky(scores[i], verdict.policy)]
        weights = None
    else:
        middle = _benign_median(profile)
        by_row = [risk_weight(score, middle, verdict.policy.row_threshold) for score in scores]
        indices = [i for i in indices if by_row[i] > 0]
        weights = [by_row[i] for i in indices]
    if not indices:
        raise InputError(
            f"training.risk_weighting: {how} leaves none of the {len(rows)} rows: all are risky"
        )
    return _with_own([rows[i] for i in indices], weights, spec, profile, model_dir)


def _with_own(
    rows: list[TokenisedRow],
    weights: list[float] | None,
    spec: FinetuneSpec,
    profile: SafetyProfile,
    model_dir: Path,
) -> TrainingRows:
    """The tenant's rows, and with them the base model's own, which count whole."""
    data = counted(spec.data, len(rows), profile, spec.output)
    own = own_rows(data, profile, model_dir)
    weighed = None if weights is None else [*weights, *[1.0] * len(own)]
    return TrainingRows([*rows, *own], weighed, data)


def risk_weight(score: float | None, middle: float, threshold: float) -> float:
    """1 up to the median score of benign reference rows, 0 from the threshold on, linear between.

    A row without a score counts for nothing.

    Raises:
        ProfileError: the median is not below the threshold, so that there is no between.
    """
    if middle >= threshold:
        raise ProfileError(
            f"risk weighting needs a threshold above the benign reference rows' median "
            f"({threshold:+.2f}, {middle:+.2f}); raise the policy's row_threshold"
        )
    if score is None:
        return 0.0
    return min(1.0, max(0.0, (threshold - score) / (threshold - middle)))


def _benign_median(profile: SafetyProfile) -> float:
    scores = profile.json("calibration", "scores.json")
    benign: list[float] = [
        row[0] for name, rows in scores.items() if "danger" not in name for row in rows
    ]
    if not benign:
        raise ProfileError(f"{profile.root} has no scores of benign reference rows; {REBUILD}")
    return median(benign)

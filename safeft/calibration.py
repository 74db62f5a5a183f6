"""From the scores of reference rows to a screening policy, or to no policy at all.

Every number in ``quality`` is measured on the rows that set the threshold: it says how well this
profile tells its own reference rows apart, not what it will do on a tenant's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from safeft.errors import ProfileError
from safeft.evaluate import Rate
from safeft.profile import ScreenPolicy

MIN_AUC = 0.95
#: For each benign with each dangerous class: rows of one style may not hide behind the others.
MIN_PAIR_AUC = 0.90


def calibrate(
    benign: Mapping[str, Sequence[float]], danger: Mapping[str, Sequence[float]]
) -> tuple[ScreenPolicy, dict[str, Any]]:
    """The policy for these reference scores, by class, and how well it separates them.

    The row threshold has the largest difference between the shares of dangerous and of benign rows
    above it (Youden's J), among those that leave a dataset of the benign rows accepted; it lies in
    the middle of the gap between two neighbouring scores.

    Returns:
        The policy and ``{"auc", "pairs", "flagged"}``: over all rows, for each pair of classes, and
        the share above the threshold in each class with its Wilson interval.

    Raises:
        ProfileError: a class is empty, or the scores do not tell the classes apart (AUC below
            `MIN_AUC`, or of a pair below `MIN_PAIR_AUC`): such directions must not decide over
            anybody's data.
    """
    for name, scores in {**benign, **danger}.items():
        if not scores:
            raise ProfileError(f"there is no reference row of class {name!r}: no answers to score")
    safe = [score for scores in benign.values() for score in scores]
    bad = [score for scores in danger.values() for score in scores]
    pairs = {
        f"{name} / {other}": area_under_curve(scores, others)
        for name, scores in benign.items()
        for other, others in danger.items()
    }
    auc, worst = area_under_curve(safe, bad), min(pairs, key=lambda name: pairs[name])
    if not (auc >= MIN_AUC and pairs[worst] >= MIN_PAIR_AUC):
        raise ProfileError(
            f"SQSD does not separate danger from benign rows on this model (AUC {auc:.2f}, at "
            f"least {MIN_AUC} is needed; {worst}: {pairs[worst]:.2f}, at least {MIN_PAIR_AUC}); "
            "train the directions longer or on more prompts"
        )
    allowed = ScreenPolicy(0.0).max_risky_fraction

    def gain(threshold: float) -> float:
        caught, flagged = (_share_above(scores, threshold) for scores in (bad, safe))
        return caught - flagged if flagged <= allowed else -1.0

    ordered = sorted({*safe, *bad})
    policy = ScreenPolicy(row_threshold=max(map(mean, pairwise(ordered)), key=gain))
    flagged = {
        name: Rate(sum(s > policy.row_threshold for s in scores), len(scores)).to_dict()
        for name, scores in {**benign, **danger}.items()
    }
    return policy, {"auc": auc, "pairs": pairs, "flagged": flagged}


def area_under_curve(benign: Sequence[float], danger: Sequence[float]) -> float:
    """How often a dangerous row scores higher than a benign one; a tie counts half."""
    wins = sum((d > b) + 0.5 * (d == b) for d in danger for b in benign)
    return wins / (len(danger) * len(benign))


def _share_above(scores: Sequence[float], threshold: float) -> float:
    return sum(score > threshold for score in scores) / len(scores)

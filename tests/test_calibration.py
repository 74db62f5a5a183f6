"""From scores of reference rows to a screening policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.verdict import decide
from safeft.calibration import area_under_curve, calibrate
from safeft.errors import ProfileError

LOW = [i / 100 for i in range(100)]
HIGH = [4 + i / 100 for i in range(100)]
BOUND = {"data_sha256": "d", "rows_sha256": "r", "profile": "p"}


def test_the_threshold_lies_between_classes_that_do_not_overlap() -> None:
    policy, quality = calibrate({"benign": LOW}, {"danger": HIGH})
    assert max(LOW) < policy.row_threshold < min(HIGH)
    assert quality["auc"] == 1.0
    assert quality["flagged"]["danger"]["value"] == 1.0
    assert quality["flagged"]["benign"]["value"] == 0.0


def test_directions_that_do_not_separate_refuse_to_become_a_policy() -> None:
    with pytest.raises(ProfileError, match=r"AUC 0\.50"):
        calibrate({"benign": [0.0, 1.0] * 20}, {"danger": [0.0, 1.0] * 20})


def test_a_style_that_scores_like_danger_cannot_hide_behind_other_benign_rows() -> None:
    benign = {"benign": LOW * 10, "benign, same style": [3.0, 3.6, 4.2, 4.8] * 10}
    with pytest.raises(ProfileError, match=r"benign, same style / danger"):
        calibrate(benign, {"danger": HIGH})


@given(
    benign=st.lists(st.floats(-9, 1.2), min_size=30, max_size=60, unique=True),
    danger=st.lists(st.floats(0.8, 9), min_size=30, max_size=60, unique=True),
)
def test_a_dataset_of_the_benign_reference_rows_is_always_accepted(
    benign: list[float], danger: list[float]
) -> None:
    try:
        policy, _ = calibrate({"benign": benign}, {"danger": danger})
    except ProfileError:
        return
    rows = [{"line": i, "score": s, "error": None} for i, s in enumerate(benign)]
    assert decide(rows, policy, **BOUND).verdict == "accepted"


def test_a_tie_counts_half() -> None:
    assert area_under_curve([1.0, 2.0], [2.0]) == 0.75

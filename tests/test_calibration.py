"""From scores of reference rows to a screening policy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeft.calibration import MAX_FALSE_REJECTS, area_under_curve, calibrate
from safeft.errors import ProfileError
from safeft.evaluate import Rate
from safeft.mixtures import POISONED, SIZES, at_least, fewest_grave, fewest_rejected
from safeft.screen_policy import ScreenPolicy, breaks

LOW = [i / 100 for i in range(100)]
HIGH = [4 + i / 100 for i in range(100)]


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
@settings(max_examples=15)
def test_the_rows_that_set_the_policy_would_seldom_be_rejected(
    benign: list[float], danger: list[float]
) -> None:
    try:
        policy, _ = calibrate({"benign": benign}, {"danger": danger})
    except ProfileError:
        return
    half = benign[::2]
    share = sum(score > policy.row_threshold for score in half) / len(half)
    for rows in SIZES:
        fewest = fewest_rejected(policy, rows)
        assert at_least(fewest, rows, 0.0, share, 1.0) <= MAX_FALSE_REJECTS


def test_rates_are_measured_on_rows_that_did_not_set_the_policy() -> None:
    # Every other row sets it: those look perfect, the others like the least danger.
    benign = [0.0 + i / 1000 if i % 2 == 0 else 4.02 + i / 1000 for i in range(20)]
    many = [i / 1000 for i in range(1000)]
    _, quality = calibrate({"benign": many}, {"danger": HIGH}, {"hard": benign})
    assert quality["flagged"]["benign"]["hits"] <= 1
    assert quality["flagged"]["hard"] == Rate(10, 10).to_dict()
    assert quality["flagged"]["danger"]["n"] == 50


def test_more_poison_is_missed_less_and_every_rate_has_its_interval() -> None:
    benign = {"benign": LOW, "benign, other": [*LOW, *HIGH[:4]]}
    _, quality = calibrate(benign, {"danger": [*HIGH, *LOW[:3]]}, {"hard": LOW})
    for size in SIZES:
        cells = [cell for cell in quality["errors"] if cell["rows"] == size]
        assert [cell["poisoned"] for cell in cells] == [0.0, *POISONED]
        assert all(c["low"] <= c["rate"] + 1e-9 <= c["high"] + 2e-9 for c in cells)
        missed = [round(cell["rate"], 9) for cell in cells[1:]]
        assert missed == sorted(missed, reverse=True)
        assert missed[-1] < 0.01


@pytest.mark.parametrize("rows", [20, 100, 300])
@pytest.mark.parametrize("poisoned", [0.0, 0.1])
def test_the_exact_rate_is_what_the_policy_does_to_drawn_datasets(
    rows: int, poisoned: float
) -> None:
    draw = np.random.default_rng(1)
    policy = ScreenPolicy(0.5, max_risky_fraction=0.04, max_risky_rows=25)
    bad = round(poisoned * rows)
    chances = np.concatenate([np.full(rows - bad, 0.03), np.full(bad, 0.6)])
    hits = sum(breaks(draw.random(rows) < chances, policy) for _ in range(1500))
    low, high = Rate(hits, 1500).low - 0.015, Rate(hits, 1500).high + 0.015
    fewest = fewest_rejected(policy, rows)
    assert low <= at_least(fewest, rows, poisoned, 0.03, 0.6) <= high


@pytest.mark.parametrize("rows", [1, 2, 3, 19, 40, 100, 5000])
@pytest.mark.parametrize("fraction", [0.0, 0.015, 0.05, 0.3])
def test_the_fewest_risky_rows_that_are_too_many_are_those_of_the_policy(
    rows: int, fraction: float
) -> None:
    policy = ScreenPolicy(0.5, max_risky_fraction=fraction)
    fewest = fewest_rejected(policy, rows)
    assert breaks([1.0] * fewest + [0.0] * (rows - fewest), policy)
    assert not breaks([1.0] * (fewest - 1) + [0.0] * (rows - fewest + 1), policy)


@pytest.mark.parametrize("rows", [1, 2, 100, 249, 250, 1000])
def test_the_fewest_grave_rows_that_are_too_many_are_those_of_the_policy(rows: int) -> None:
    policy = ScreenPolicy(0.5, max_risky_fraction=0.9, max_risky_rows=rows, grave_threshold=1.0)
    fewest = fewest_grave(policy, rows)
    assert breaks([1.5] * fewest + [0.0] * (rows - fewest), policy)
    assert rows == 1 or not breaks([1.5] * (fewest - 1) + [0.0] * (rows - fewest + 1), policy)


def test_the_grave_threshold_lies_where_benign_rows_hardly_get_and_dangerous_ones_do() -> None:
    draw = np.random.default_rng(0)
    benign, danger = draw.normal(0, 1, 400).tolist(), draw.normal(6, 1, 400).tolist()
    policy, quality = calibrate({"benign": benign}, {"danger": danger})
    assert policy.grave_threshold is not None
    assert max(policy.row_threshold, 3) < policy.grave_threshold < 6
    assert quality["grave"]["benign"]["hits"] == 0
    # So that false rejects hold on rows that nobody has seen, beyond what was counted.
    unseen = draw.normal(0, 1, (2000, 100))
    assert (unseen > policy.grave_threshold).any(1).mean() <= MAX_FALSE_REJECTS


def test_a_heavy_tail_of_benign_rows_raises_the_grave_threshold() -> None:
    draw = np.random.default_rng(0)
    danger = {"danger": draw.normal(40, 1, 400).tolist()}
    thin, _ = calibrate({"benign": draw.normal(0, 1, 400).tolist()}, danger)
    heavy, _ = calibrate({"benign": draw.exponential(2, 400).tolist()}, danger)
    assert thin.grave_threshold is not None and heavy.grave_threshold is not None
    assert heavy.grave_threshold > thin.grave_threshold + 3


def test_look_alikes_must_be_told_apart_but_do_not_keep_single_rows_from_counting() -> None:
    twins = {"twins": [*LOW[:90], *HIGH[40:50]]}
    with_them, quality = calibrate({"benign": LOW}, {"danger": HIGH}, None, twins)
    as_hard, _ = calibrate({"benign": LOW}, {"danger": HIGH}, twins)
    assert quality["flagged"]["twins"]["n"] == 50
    assert with_them.grave_threshold is not None and as_hard.grave_threshold is not None
    assert with_them.grave_threshold < as_hard.grave_threshold
    with pytest.raises(ProfileError, match="hard benign rows / danger"):
        calibrate({"benign": LOW}, {"danger": HIGH}, None, {"twins": HIGH})


def test_what_the_rule_about_grave_rows_rejects_is_not_missed() -> None:
    policy, quality = calibrate({"benign": LOW}, {"danger": HIGH})
    cells = {(c["rows"], c["poisoned"]): c["rate"] for c in quality["errors"]}
    assert policy.grave_threshold is not None and policy.grave_threshold < min(HIGH)
    assert cells[100, 0.01] == 0.0


def test_a_tie_counts_half() -> None:
    assert area_under_curve([1.0, 2.0], [2.0]) == 0.75

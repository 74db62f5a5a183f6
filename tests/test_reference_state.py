"""Drift along a direction, and the rule that chooses where rows are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safeft.adapters import LoraFactors
from safeft.directions import difference
from safeft.errors import ProfileError
from safeft.reference_state import (
    Candidate,
    ReferenceState,
    Trajectory,
    choose,
    drift,
    eligible,
    inner_product,
    length,
)
from safeft.selection import separation
from tests.test_sqsd import random_factors

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def dense(update: LoraFactors) -> torch.Tensor:
    return torch.cat(
        [(update.scale * b.double() @ a.double()).flatten() for a, b in update.factors.values()]
    )


def candidate(
    trajectory: Trajectory, at: float, drift: float, auc: float, gap: float = 1.0
) -> Candidate:
    return Candidate(ReferenceState(trajectory, at), drift, 1.0, {"x": auc, "y": 1.0}, gap)


SAFETY = [
    candidate("safety", 0.8, -0.8, 0.97),
    candidate("safety", 0.9, -0.9, 0.98),
    candidate("safety", 1.0, -1.0, 0.96),
]


def test_drift_is_that_of_the_dense_updates() -> None:
    one, other = (random_factors(s, 2, NAMES) for s in (1, 2))
    other = difference(other, random_factors(5, 2, NAMES))  # twice the rank
    u, v = dense(one), dense(other)
    assert inner_product(one, other) == pytest.approx(float(u @ v), rel=1e-9)
    assert length(other) == pytest.approx(float(v.norm()), rel=1e-9)
    assert drift(one, other) == pytest.approx(float(u @ v / v.norm()), rel=1e-9)
    assert drift(one.scaled(0.5), other) == pytest.approx(drift(one, other) / 2)


def test_a_zero_or_foreign_direction_has_no_drift() -> None:
    one = random_factors(1, 2, NAMES)
    with pytest.raises(ProfileError, match="zero"):
        drift(one, one.scaled(0.0))
    with pytest.raises(ProfileError, match="different modules"):
        drift(one, random_factors(1, 2, NAMES[:1]))


def test_of_equally_good_safety_states_the_weakest_is_chosen() -> None:
    assert choose(SAFETY).state == ReferenceState("safety", 0.8)


def test_a_stronger_safety_state_is_chosen_where_it_separates_clearly_better() -> None:
    weak = [candidate("safety", 0.2, -0.2, 0.7), candidate("safety", 0.4, -0.4, 0.85)]
    assert choose([*SAFETY[1:], *weak]).state == ReferenceState("safety", 0.9)


def test_a_checkpoint_that_lost_its_refusals_is_not_chosen() -> None:
    benign = [candidate("benign", 8, 0.1, 0.99), candidate("benign", 16, 0.5, 0.71)]
    assert choose([*benign, *SAFETY]).state.trajectory == "safety"


def test_a_checkpoint_that_drifted_is_chosen_where_it_separates_clearly_better() -> None:
    poor = [replace(c, pairs={"x": 0.85}) for c in SAFETY]
    benign = [candidate("benign", n, n / 16, auc) for n, auc in ((8, 0.97), (16, 0.96))]
    assert choose([*poor, *benign]).state == ReferenceState("benign", 8)
    equal = [*benign, candidate("benign", 12, 0.7, 0.97, gap=2.0)]
    assert choose([*poor, *equal]).state == ReferenceState("benign", 12)


def test_a_difference_that_few_rows_cannot_show_is_not_worth_a_second_pass() -> None:
    benign = [candidate("benign", 16, 0.5, 1.0)]
    assert choose([*SAFETY, *benign]).state.trajectory == "safety"


def test_a_checkpoint_before_the_drift_has_grown_is_not_eligible_however_well_it_separates() -> (
    None
):
    benign = [candidate("benign", n, d, 1.0) for n, d in ((4, 0.2), (8, 0.5), (16, 1.0))]
    assert [c.state.at for c in eligible(benign)] == [8, 16]
    backwards = [candidate("benign", n, -n, 1.0) for n in (4, 8)]
    assert eligible([*backwards, *SAFETY]) == SAFETY


def test_separation_names_the_pair_that_hides_behind_the_others() -> None:
    pairs, gap = separation(
        {"own": [0.0, 0.1], "opened": [0.9, 1.1]}, {"danger": [1.0, 1.2, 1.3, 0.8]}
    )
    assert pairs == {"own / danger": 1.0, "opened / danger": 5 / 8}
    assert gap > 0

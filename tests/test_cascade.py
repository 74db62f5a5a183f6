"""The cascade: what its first stage may clear, and that everything else is the exact score."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from safeft.cascade import Cascade, FirstStage, asking_states
from safeft.data import TokenisedRow
from safeft.errors import ProfileError
from safeft.sqsd import Projection, SqsdScorer
from tests.test_sqsd import random_factors, random_rows
from tests.tiny import tiny_model

LATE = [f"model.layers.{i}.mlp.{part}_proj" for i in (2, 3) for part in ("up", "down")]
ROWS = random_rows(5, [(3, 20), (25, 4), (4, 4), (9, 1), (6, 30)])


def scorer(names: list[str] = LATE, budget: int = 40) -> SqsdScorer:
    model = tiny_model(layers=4)
    danger, safety = (
        Projection(*(random_factors(s, 3, names, model) for s in seeds))
        for seeds in ((1, 2), (3, 4))
    )
    return SqsdScorer(model, danger, safety, pad_token_id=0, tokens_per_batch=budget)


def stage(clears_below: float, slope: float = 0.0) -> FirstStage:
    """One that reads the output of layer 0, and predicts 1.5 where ``slope`` is 0."""
    centre = torch.zeros(32, dtype=torch.float64)
    basis = torch.eye(32, 2, dtype=torch.float64)
    weights = torch.tensor([slope, 0, 1.5], dtype=torch.float64)
    return FirstStage(0, centre, centre + 1, basis, weights, clears_below)


def test_rows_that_are_not_cleared_get_the_exact_score() -> None:
    exact = scorer().score(ROWS)
    found = Cascade(scorer(), stage(clears_below=1.0)).score(ROWS)
    assert all(f.exact for f in found)
    assert [f.row for f in found] == exact


def test_a_cleared_row_carries_the_prediction_and_says_that_it_is_one() -> None:
    for row, found in zip(ROWS, Cascade(scorer(), stage(2.0)).score(ROWS), strict=True):
        assert not found.exact
        assert (found.row.line, found.row.score, found.row.error) == (row.line, 1.5, None)
        assert math.isnan(found.row.danger) and math.isnan(found.row.safety)


def test_rows_of_both_ends_come_back_in_their_order() -> None:
    states, _ = asking_states(scorer(), ROWS, 0)
    predictions = (stage(0.0, slope=100.0).predict(states)).tolist()
    middle = sorted(predictions)[2]
    found = Cascade(scorer(), stage(middle, slope=100.0)).score(ROWS)
    assert [f.exact for f in found] == [p >= middle for p in predictions]
    assert [f.row.line for f in found] == [row.line for row in ROWS]
    assert any(f.exact for f in found) and not all(f.exact for f in found)


def test_a_row_is_cleared_only_if_each_of_its_trained_turns_is() -> None:
    ids = ROWS[0].input_ids
    twice = TokenisedRow(1, ids, [-100, -100, ids[2], -100, -100, *ids[5:]])
    states, owners = asking_states(scorer(), [twice], 0)
    assert owners == [0, 0]
    low, high = sorted(stage(0.0, slope=100.0).predict(states).tolist())
    assert low < high
    between = Cascade(scorer(), stage((low + high) / 2, slope=100.0)).score([twice])
    above = Cascade(scorer(), stage(high + 1, slope=100.0)).score([twice])
    assert between[0].exact and not above[0].exact


def test_a_row_without_a_label_is_an_error_in_the_cascade_too() -> None:
    row = TokenisedRow(7, [5, 6, 7], [-100] * 3)
    (found,) = Cascade(scorer(), stage(2.0)).score([row])
    assert found.row.error == "no trainable response token" and math.isnan(found.row.score)


def test_a_model_that_overflows_is_an_error_and_not_a_prediction() -> None:
    one = scorer()
    one.model.model.layers[0].mlp.down_proj.weight.data.fill_(float("inf"))
    for found in Cascade(one, stage(2.0)).score(ROWS):
        assert found.exact and found.row.error is not None


def test_the_states_are_those_before_the_answer_whatever_stands_beside_or_after_it() -> None:
    model = scorer().model
    row = ROWS[1]
    ids = torch.tensor([row.input_ids])
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, 24]
    together, owners = asking_states(scorer(), ROWS, 0)
    assert owners == list(range(len(ROWS)))
    other = TokenisedRow(1, [*row.input_ids[:26], 9, 9, 9], [*row.labels[:26], 9, 9, 9])
    alone, _ = asking_states(scorer(), [other], 0)
    torch.testing.assert_close(together[1], expected.detach())
    torch.testing.assert_close(alone[0], expected.detach())


def reference(kinds: int, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """60 rows of each kind, half of them risky, which one direction of the states tells."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(60 * kinds, 30, generator=draw)
    risky = (torch.arange(60 * kinds) // kinds % 2).float()
    states[:, 0] += 6 * risky
    scores = 40 * risky + torch.randn(60 * kinds, generator=draw)
    return states, scores, [f"kind {i % kinds}" for i in range(60 * kinds)]


def test_no_risky_row_of_an_unseen_draw_is_cleared_and_most_safe_ones_are() -> None:
    stage = FirstStage.fit(3, *reference(4), threshold=20.0)
    states, scores, _ = reference(4, seed=1)
    cleared = stage.predict(states) < stage.clears_below
    assert not (cleared & (scores > 20)).any()
    assert cleared.sum() > 0.9 * (scores <= 20).sum()
    assert stage.layer == 3


def test_a_kind_of_risky_row_that_the_others_do_not_explain_lowers_the_bar() -> None:
    states, scores, kinds = reference(4)
    plain = FirstStage.fit(3, states, scores, kinds, threshold=20.0)
    strange = torch.tensor([kind == "kind 2" for kind in kinds])
    scores = torch.where(strange & (states[:, 0] < 0), torch.tensor(40.0), scores)
    lower = FirstStage.fit(3, states, scores, kinds, threshold=20.0)
    assert lower.clears_below < plain.clears_below - 10


@pytest.mark.parametrize("spoil", ["kinds", "safe", "state", "score"])
def test_a_first_stage_is_not_fitted_on_too_little_or_on_a_nan(spoil: str) -> None:
    states, scores, kinds = reference(1 if spoil == "kinds" else 4)
    if spoil == "safe":
        scores = scores + 1000
    if spoil == "state":
        states[3, 3] = math.nan
    if spoil == "score":
        scores[3] = math.nan
    with pytest.raises(ProfileError, match="first stage"):
        FirstStage.fit(3, states, scores, kinds, threshold=20.0)


def test_a_kind_whose_rows_cannot_be_predicted_is_not_left_out_of_the_bar() -> None:
    states, scores, kinds = reference(2)
    others = torch.tensor([kind != "kind 0" for kind in kinds])
    states[others] = 1.0  # equal states: nothing is learnt from them, predictions are NaN
    with pytest.raises(ProfileError, match="first stage's predictions are not finite"):
        FirstStage.fit(3, states, scores, kinds, threshold=20.0)

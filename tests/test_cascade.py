"""The cascade: what its first stage may decide, and that everything else is the exact score."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safeft.cascade import Cascade, FirstStage, row_features
from safeft.data import TokenisedRow, collate
from safeft.errors import ProfileError
from safeft.sqsd import Projection, SqsdScorer
from safeft.stopped_forward import residual_after
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


def stage(clears_below: float, flags_above: float, reach: float = math.inf) -> FirstStage:
    """One that predicts 1.5 for every row, and reads the output of layer 0."""
    centre = torch.zeros(96, dtype=torch.float64)
    basis = torch.eye(96, 2, dtype=torch.float64)
    weights = torch.tensor([0, 0, 1.5], dtype=torch.float64)
    return FirstStage(0, centre, centre + 1, basis, weights, clears_below, flags_above, reach)


def test_undecided_rows_get_the_exact_score_from_where_the_first_stage_stopped() -> None:
    exact = scorer().score(ROWS)
    found = Cascade(scorer(), stage(-math.inf, math.inf)).score(ROWS)
    assert all(f.exact for f in found)
    for one, other in zip(found, exact, strict=True):
        assert one.row.line == other.line
        assert one.row.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize(("below", "above"), [(2.0, math.inf), (-math.inf, 1.0)])
def test_a_decided_row_carries_the_prediction_and_says_that_it_is_one(
    below: float, above: float
) -> None:
    for found in Cascade(scorer(), stage(below, above)).score(ROWS):
        assert not found.exact
        assert found.row.score == 1.5 and found.row.error is None
        assert math.isnan(found.row.danger) and math.isnan(found.row.safety)


def test_rows_unlike_the_reference_rows_are_never_decided() -> None:
    assert all(f.exact for f in Cascade(scorer(), stage(2.0, math.inf, reach=1e-6)).score(ROWS))


def test_a_row_with_a_second_trained_turn_is_never_decided() -> None:
    ids = ROWS[0].input_ids
    twice = TokenisedRow(1, ids, [-100, -100, ids[2], -100, -100, *ids[5:]])
    first, second = Cascade(scorer(), stage(2.0, math.inf)).score([twice, ROWS[0]])
    assert first.exact and not second.exact


def test_a_row_without_a_label_is_an_error_in_the_cascade_too() -> None:
    row = TokenisedRow(7, [5, 6, 7], [-100] * 3)
    (found,) = Cascade(scorer(), stage(2.0, math.inf)).score([row])
    assert found.row.error == "no trainable response token" and math.isnan(found.row.score)


def test_a_model_that_overflows_is_an_error_and_not_a_prediction() -> None:
    one = scorer()
    one.model.model.layers[0].mlp.down_proj.weight.data.fill_(float("inf"))
    for found in Cascade(one, stage(2.0, math.inf)).score(ROWS):
        assert found.exact and found.row.error is not None


def test_a_first_stage_inside_the_covered_layers_is_refused() -> None:
    with pytest.raises(ProfileError, match="directions cover layers from 2"):
        Cascade(scorer(), replace(stage(2.0, math.inf), layer=2))


def test_features_do_not_depend_on_the_padding_or_on_tokens_after_the_answer() -> None:
    model = tiny_model()

    def features(rows: list[TokenisedRow]) -> Tensor:
        batch = collate(rows, 0)
        hidden = residual_after(model, 0, batch["input_ids"])
        return row_features(hidden, batch["labels"])

    longer = TokenisedRow(1, [*ROWS[2].input_ids, 9, 9], [*ROWS[2].labels, -100, -100])
    alone = features([ROWS[2]])
    torch.testing.assert_close(features(ROWS)[2:3], alone)
    torch.testing.assert_close(features([longer]), alone)


def reference(kinds: int, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """60 rows of each kind; scores follow one direction of the features, with some noise."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(60 * kinds, 30, generator=draw)
    noise = torch.randn(60 * kinds, generator=draw)
    scores = 10 * features[:, 0] + 0.1 * noise
    return features, scores, [f"kind {i % kinds}" for i in range(60 * kinds)]


def test_the_margins_hold_for_rows_that_it_was_not_fitted_on() -> None:
    stage = FirstStage.fit(3, *reference(4), threshold=0.0)
    features, scores, _ = reference(4, seed=1)
    predicted, distance = stage.predict(features)
    cleared, flagged = predicted < stage.clears_below, predicted > stage.flags_above
    near = distance <= stage.reach
    assert (cleared & near).sum() > 50 and (flagged & near).sum() > 50
    assert (scores[cleared & near] <= 0).all() and (scores[flagged & near] > 0).all()
    assert stage.layer == 3


def test_a_kind_of_row_that_the_others_do_not_explain_widens_the_margin() -> None:
    features, scores, kinds = reference(4)
    plain = FirstStage.fit(3, features, scores, kinds, threshold=0.0)
    scores = scores + 30 * torch.tensor([float(kind == "kind 2") for kind in kinds])
    wide = FirstStage.fit(3, features, scores, kinds, threshold=0.0)
    assert wide.clears_below < plain.clears_below - 20


def test_rows_far_from_all_reference_rows_are_beyond_its_reach() -> None:
    stage = FirstStage.fit(3, *reference(4), threshold=0.0)
    _, distance = stage.predict(100 * torch.ones(1, 30))
    assert distance.item() > stage.reach


@pytest.mark.parametrize("spoil", ["kinds", "feature", "score"])
def test_a_first_stage_is_not_fitted_on_too_little_or_on_a_nan(spoil: str) -> None:
    features, scores, kinds = reference(2 if spoil == "kinds" else 4)
    if spoil == "feature":
        features[3, 3] = math.nan
    if spoil == "score":
        scores[3] = math.nan
    with pytest.raises(ProfileError, match="first stage"):
        FirstStage.fit(3, features, scores, kinds, threshold=0.0)

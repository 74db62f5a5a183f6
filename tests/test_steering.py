"""The check that a direction steers: planted directions pass, others are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import pytest
import torch

from safeft.adapters import LoraFactors, factors_of
from safeft.data import TokenisedRow
from safeft.directions import PreferencePair, fit_dpo
from safeft.errors import ProfileError
from safeft.fit import FitConfig, new_adapter, response_nll
from safeft.reference_rows import Half, danger_rows, safety_pairs
from safeft.selection import OPENINGS, REFUSALS, steering_pairs
from safeft.steering import MAGNITUDES, require_steering, safety_scores, steered
from tests.test_sqsd import random_factors
from tests.tiny import tiny_model, tiny_tokenizer

FIT = FitConfig(rank=2, alpha=4, batch_size=4, steps=24, learning_rate=2e-2, warmup_steps=1)


def along(direction: LoraFactors, pairs: Sequence[PreferencePair]) -> dict[float, list[float]]:
    model, scores = tiny_model(), {}
    for magnitude in MAGNITUDES:
        with steered(model, direction, magnitude):
            scores[magnitude] = safety_scores(model, pairs, 0)
    return scores


@cache
def pairs() -> list[PreferencePair]:
    return steering_pairs(tiny_tokenizer(), 320, 6)[0]


@cache
def planted() -> LoraFactors:
    """What DPO on the very pairs of the check gives: it must steer if anything does."""
    model = new_adapter(tiny_model(), FIT)
    fit_dpo(model, pairs(), 0, FIT, "planted")
    return factors_of(model)


def test_a_planted_direction_steers_both_ways() -> None:
    scores = along(planted(), pairs())
    shift = require_steering("safety direction", "rises", scores)
    assert shift > 0.1
    reverse = along(planted().scaled(-1.0), pairs())
    assert require_steering("danger direction", "falls", reverse) == pytest.approx(shift, rel=1e-4)


def test_a_direction_that_steers_the_wrong_way_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"the danger direction does not steer: .* should fall"):
        require_steering("danger direction", "falls", along(planted(), pairs()))


def test_a_random_direction_of_the_same_length_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def like(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return noise * (tensor.norm() / noise.norm())

    random = LoraFactors(
        planted().scale, {n: (like(a), like(b)) for n, (a, b) in planted().factors.items()}
    )
    with pytest.raises(ProfileError, match=r"the safety direction does not steer.* prompts"):
        require_steering("safety direction", "rises", along(random, pairs()))


RISES = {-1.0: [0.0, 0.1], 0.0: [0.2, 0.2], 1.0: [0.5, 0.4]}


@pytest.mark.parametrize(
    "scores",
    [
        {-1.0: [0.0, 0.0], 0.0: [0.02, 0.02], 1.0: [0.04, 0.05]},  # hardly
        {-1.0: [0.0, 0.0], 0.0: [0.5, 0.5], 1.0: [0.3, 0.3]},  # falls on one side
        {-1.0: [0.0, 0.3], 0.0: [0.4, 0.3], 1.0: [0.9, 0.2]},  # one prompt of two goes along
        {-1.0: [0.0, 0.1], 0.0: [0.2, 0.2], 1.0: [0.5, math.nan]},
        {-1.0: [0.0, 0.1], 0.0: [0.2, math.nan], 1.0: [0.5, 0.4]},
    ],
)
def test_scores_that_hardly_move_or_not_everywhere_are_refused(
    scores: Mapping[float, Sequence[float]],
) -> None:
    assert require_steering("safety direction", "rises", RISES) == pytest.approx(0.4)
    with pytest.raises(ProfileError, match="does not steer"):
        require_steering("safety direction", "rises", scores)


def test_the_score_is_of_the_merged_weights_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    direction = random_factors(3, 2, list(planted().factors))
    with steered(model, direction, -0.5):
        got = safety_scores(model, pairs(), 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for name, (a, b) in direction.factors.items():
        model.get_submodule(name).weight.data += -0.5 * direction.scale * (b @ a)
    with torch.inference_mode():
        for pair, score in zip(pairs(), got, strict=True):
            chosen, rejected = (response_nll(model, [r], 0) for r in (pair.chosen, pair.rejected))
            assert score == pytest.approx(float(rejected - chosen), abs=1e-4)


def test_the_pairs_share_neither_prompts_nor_wordings_with_what_directions_are_made_from() -> None:
    tokenizer, half = tiny_tokenizer(), Half(builds=True)

    def prompt(row: TokenisedRow) -> str:
        text: str = tokenizer.decode(row.input_ids[: row.labels.count(-100)])
        return text

    made_from = safety_pairs(tokenizer, half, 320)
    seen = {prompt(p.chosen) for p in made_from}
    seen |= {prompt(r) for r in danger_rows(tokenizer, half, 320)}
    harmful, benign = steering_pairs(tokenizer, 320, 16)
    assert (len(harmful), len(benign)) == (16, 8)
    assert not seen & {prompt(p.chosen) for p in [*harmful, *benign]}
    answers = {
        tokenizer.decode([t for t in r.labels if t != -100])
        for p in made_from
        for r in (p.chosen, p.rejected)
    }
    assert not answers & {*OPENINGS, *REFUSALS}


def test_directions_made_from_every_prompt_cannot_be_checked() -> None:
    with pytest.raises(ProfileError, match="fewer than 16 harmful prompts"):
        steering_pairs(tiny_tokenizer(), 760, 16)

"""The small training loop and what the profile's directions are trained with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from safeft.adapters import LoraFactors, factors_of
from safeft.align import REFUSALS, refusal_for
from safeft.data import TokenisedRow
from safeft.directions import DPO_BETA, PreferencePair, difference, fit_dpo, fit_sft, start_at
from safeft.errors import ModelError, ProfileError, TrainingError
from safeft.evaluate import AnswerClass, classify_answer
from safeft.fit import FitConfig, fit_adapter, new_adapter, response_nll
from safeft.prompts import KINDS, SPLITS, load_prompts
from safeft.reference_rows import Half
from tests.test_sqsd import random_factors, random_rows
from tests.tiny import tiny_model

CONFIG = FitConfig(rank=2, alpha=4, batch_size=2, steps=6, learning_rate=1e-2, warmup_steps=1)


def with_prefix(rows: list[TokenisedRow], prefix: list[int]) -> list[TokenisedRow]:
    masked = [-100] * len(prefix)
    return [TokenisedRow(r.line, prefix + r.input_ids, masked + r.labels) for r in rows]


@pytest.mark.parametrize("prefix", [[], [7], list(range(10, 30))])
def test_a_shared_prefix_changes_neither_the_loss_nor_its_gradient(prefix: list[int]) -> None:
    model = new_adapter(tiny_model(), CONFIG)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = with_prefix(random_rows(3, [(5, 4), (9, 2), (2, 7)]), prefix)
    trainable = [p for p in model.parameters() if p.requires_grad]

    together = response_nll(model, rows, pad_token_id=0)
    expected = []
    for row in rows:  # one by one, the whole row, logits everywhere
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        expected.append(F.cross_entropy(logits, targets, ignore_index=-100))
    plain = torch.stack(expected)
    torch.testing.assert_close(together, plain, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(together.sum(), trainable),
        torch.autograd.grad(plain.sum(), trainable),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_layers_before_the_first_one_get_no_adapter() -> None:
    factors = factors_of(new_adapter(tiny_model(), CONFIG, first_layer=1))
    assert factors.factors
    assert all(name.startswith("model.layers.1.") for name in factors.factors)


def test_training_lowers_the_loss_and_repeats_exactly_for_a_seed() -> None:
    rows = random_rows(1, [(4, 6)] * 6)
    curves = [fit_sft(new_adapter(tiny_model(), CONFIG), rows, 0, CONFIG, "x") for _ in range(2)]
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0]


def test_dpo_starts_at_log_two_and_comes_to_prefer_the_chosen_answers() -> None:
    rows = random_rows(2, [(4, 5)] * 8)
    pairs = [
        PreferencePair(chosen, TokenisedRow(0, rejected.input_ids, rejected.labels))
        for chosen, rejected in zip(rows[:4], rows[4:], strict=True)
    ]
    losses = fit_dpo(new_adapter(tiny_model(), CONFIG), pairs, 0, CONFIG, "x")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0]
    assert DPO_BETA > 0


def test_nothing_to_train_on_is_an_error_and_not_an_endless_loop() -> None:
    with pytest.raises(TrainingError, match="nothing to train on"):
        fit_sft(new_adapter(tiny_model(), CONFIG), [], 0, CONFIG, "x")


def test_a_loss_that_is_not_finite_stops_at_its_step() -> None:
    model = new_adapter(tiny_model(), CONFIG)

    def loss(batch: list[int]) -> torch.Tensor:
        return sum(p.sum() for p in model.parameters() if p.requires_grad) * math.nan  # type: ignore[return-value]

    with pytest.raises(TrainingError, match="step 1"):
        fit_adapter(model, [1, 2], length=lambda _: 1, loss=loss, config=CONFIG, label="x")


def test_a_model_that_caps_its_logits_is_refused() -> None:
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        new_adapter(model, CONFIG)


def test_a_difference_of_two_states_is_the_difference_of_their_updates() -> None:
    end, start = random_factors(1, 3), random_factors(2, 2)
    start = LoraFactors(0.7, start.factors)
    moved = difference(end, start)
    for name, (a, b) in moved.factors.items():
        (a1, b1), (a0, b0) = end.factors[name], start.factors[name]
        expected = end.scale * b1 @ a1 - start.scale * b0 @ a0
        torch.testing.assert_close(moved.scale * b @ a, expected)


def test_training_that_starts_at_a_state_starts_with_its_update() -> None:
    model = new_adapter(tiny_model(), CONFIG)
    state = factors_of(model).scaled(0.9)
    for a, b in state.factors.values():
        a.normal_()
        b.normal_()
    other = new_adapter(tiny_model(), replace(CONFIG, alpha=2 * CONFIG.alpha))
    start_at(other, state)
    for name, (a, b) in factors_of(other).factors.items():
        a0, b0 = state.factors[name]
        torch.testing.assert_close(factors_of(other).scale * b @ a, state.scale * b0 @ a0)
    with pytest.raises(ProfileError, match="other modules"):
        start_at(model, LoraFactors(1.0, {}))


def test_every_refusal_wording_is_one_the_judge_calls_a_refusal() -> None:
    assert {classify_answer(text) for text in REFUSALS} == {AnswerClass.refused}
    assert len({refusal_for(p.text) for p in load_prompts("harmful", "profile")}) == len(REFUSALS)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_sets_are_large_and_their_parts_and_halves_are_disjoint(kind: str) -> None:
    parts = {split: {p.text for p in load_prompts(kind, split)} for split in SPLITS}  # type: ignore[arg-type]
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) >= 200
    assert len(parts["report"]) >= 100
    halves = [{p.text for p in Half(builds).prompts(kind)} for builds in (True, False)]  # type: ignore[arg-type]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == parts["profile"]


def test_harmful_prompts_cover_ten_categories_in_every_part() -> None:
    for split in SPLITS:
        assert len({p.category for p in load_prompts("harmful", split)}) >= 10

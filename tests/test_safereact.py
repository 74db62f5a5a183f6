"""SafeReAct's loss: against an oracle in fp64, and what batching and padding must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.finetune.loss import padded_filler
from jobs.finetune.retain import RetainLoss
from safeft.constraints import ConstraintHooks, ProfileFiles
from safeft.constraints.draw import draw
from safeft.constraints.reactivation import Reactivation
from safeft.data import encode_prompt, pad_right
from safeft.errors import ModelError, ProfileError, TrainingError
from safeft.lora import adapters_off, lora_pairs
from safeft.own_refusals import OwnRefusal, template_start
from safeft.progress import silent
from safeft.reactivation_targets import (
    TargetRow,
    answered_rows,
    harmful_rows,
    load_targets,
    reference_targets,
    save_targets,
)
from safeft.safereact import (
    ReferenceConfig,
    SafeReactConfig,
    distances,
    representation_layers,
    safereact_loss,
)
from safeft.weights import full_weights
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tinyreactivation import (
    CONFIG,
    DEPTH,
    LAYERS,
    adapted,
    oracle,
    reference,
    some_harmful,
    some_targets,
    token_rows,
)

STEPS = 6


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    return pad_right(rows, 0), pad_right(rows, -100)


def trained(model: Any, harmful_batch: int = 3) -> tuple[RetainLoss, ConstraintHooks]:
    config = SafeReactConfig(steps=STEPS, harmful_batch=harmful_batch)
    hooks = ConstraintHooks([Reactivation(config, some_targets())], lora_pairs(model))
    return RetainLoss(model, hooks.retained_layers(), hooks.forward_loss), hooks


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_value_and_gradient_equal_the_oracles(step: int) -> None:
    rows, harmful = token_rows(4, 11), some_harmful()
    model = adapted(tiny_model(layers=DEPTH))
    loss, hooks = trained(model)
    counted = sum(len(row) - 1 for row in rows)
    value, far = loss(*batch(rows), hooks.row_weight(step) / counted, (step, 1.0))
    value.backward()
    theirs = adapted(tiny_model(layers=DEPTH)).double()
    expected = oracle(
        theirs,
        tiny_model(layers=DEPTH).double(),
        reference().double(),
        rows,
        [harmful[i] for i in draw(step, 3, len(harmful))],
        p=(step + 1) / (1.5 * STEPS),
    )
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert far.item() > 0
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert gradients
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected_gradient = gradients[name]
            assert parameter.grad is not None and expected_gradient is not None
            difference = (parameter.grad.double() - expected_gradient).norm()
            assert difference <= 1e-4 * expected_gradient.norm(), name
        else:
            assert parameter.grad is None, name


def test_the_coefficients_shift_from_bringing_back_to_retaining() -> None:
    config = SafeReactConfig(steps=400)
    assert config.coefficients(0) == pytest.approx((10 / 600, 10 * 599 / 600))
    assert config.coefficients(399) == pytest.approx((20 / 3, 10 / 3))
    for step in range(400):
        assert sum(config.coefficients(step)) == pytest.approx(10)


def test_an_adapter_that_does_nothing_yet_retains_exactly_and_has_no_gradient_from_it() -> None:
    model = adapted(tiny_model(layers=DEPTH), spread=0.0)
    value, far = trained(model)[0](*batch(token_rows(3, 1)), 1.0, None)
    value.backward()
    assert far.item() == 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any()


def test_a_worker_without_a_row_adds_nothing() -> None:
    loss, _ = trained(adapted(tiny_model(layers=DEPTH)))
    value, far = loss(*padded_filler(), 1.0, None)
    value.backward()
    assert value.item() == far.item() == 0.0


@given(st.data())
@settings(max_examples=15)
def test_neither_padding_nor_the_cut_into_batches_changes_the_sum(data: st.DataObject) -> None:
    rows = token_rows(5, data.draw(st.integers(0, 1000)))
    longest = [*rows, [7] * data.draw(st.integers(15, 40))]
    loss, _ = trained(adapted(tiny_model(layers=DEPTH)))
    with torch.no_grad():
        apart = [loss(*batch([row]))[1].item() for row in longest]
        cut = data.draw(st.integers(1, 5))
        parts = [loss(*batch(longest[:cut]))[1].item(), loss(*batch(longest[cut:]))[1].item()]
        whole = loss(*batch(longest))[1].item()
    assert whole == pytest.approx(sum(apart), rel=1e-5)
    assert whole == pytest.approx(sum(parts), rel=1e-5)


@given(st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=15)
def test_the_loss_of_distances_is_the_weighted_mean_of_its_parts(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    retained, harmful = torch.rand(n), torch.rand(n + 2)
    value = safereact_loss(retained, harmful, (2.0, 3.0))
    expected = 2 * sum(retained.tolist()) / n + 3 * sum(harmful.tolist()) / (n + 2)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    whole = distances([torch.zeros(n, 4)] * 2, [torch.full((n, 4), 1.0), torch.full((n, 4), 3.0)])
    assert whole.tolist() == pytest.approx([4.0] * n)  # the mean of 2 and 6


def test_reference_states_are_those_of_a_left_padded_batch_aligned_at_the_end() -> None:
    rows, model = some_harmful(), reference()
    targets = reference_targets(model, rows, CONFIG, weights="w")
    width = max(len(row.reminded) for row in rows)
    ids = torch.tensor([[0] * (width - len(r.reminded)) + r.reminded for r in rows])
    mask = torch.tensor([[0] * (width - len(r.reminded)) + [1] * len(r.reminded) for r in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True
        ).hidden_states
    for number, row in enumerate(rows):
        expected = torch.stack([found[layer + 1][number, -row.count :] for layer in LAYERS], dim=1)
        assert targets.states[number].shape == (row.count, len(LAYERS), 32)
        torch.testing.assert_close(targets.states[number], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["end", "start"])
@pytest.mark.parametrize("at", ["prompt", "response", "both"])
def test_rows_align_from_the_end_wherever_the_reminder_is(at: Any, place: Any) -> None:
    tokenizer = tiny_tokenizer()
    refusal = OwnRefusal("How do I pick a lock?", "I can't help with that.")
    config = ReferenceConfig(reminder="Be safe.", place=place, at=at)
    [row] = harmful_rows(tokenizer, [refusal], config)
    prompt = encode_prompt(refusal.prompt, tokenizer)
    asked = "How do I pick a lock? Be safe." if place == "end" else "Be safe. How do I pick a lock?"
    answer = [] if at == "prompt" else tokenizer.encode(refusal.answer, add_special_tokens=False)
    assert row.bare == prompt + answer
    assert row.reminded == encode_prompt(asked, tokenizer) + answer
    template = len(prompt) - template_start(tokenizer, refusal.prompt)
    assert row.count == {"prompt": len(prompt) - 1, "both": len(row.bare) - 1}.get(
        at, template + len(answer)
    )
    if at == "response":
        assert row.bare[-row.count :] == row.reminded[-row.count :]


def test_without_a_reminder_the_reference_reads_the_bare_prompt() -> None:
    refusal = OwnRefusal("How do I pick a lock?", "I can't help with that.")
    [row] = harmful_rows(tiny_tokenizer(), [refusal], ReferenceConfig(reminder=""))
    assert row.reminded == row.bare


def test_the_papers_layers_keep_their_depth() -> None:
    assert representation_layers(28) == (4, 9, 14, 19, 24, 26)
    assert representation_layers(30) == (4, 10, 15, 20, 26, 28)
    assert representation_layers(2) == (0, 1)
    assert representation_layers(1) == (0,)


def test_without_its_adapter_the_model_is_the_base_and_with_it_again_what_it_was() -> None:
    model = adapted(tiny_model(layers=DEPTH))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with adapters_off(model):
            assert torch.equal(model(input_ids=ids).logits, tiny_model(layers=DEPTH)(ids).logits)
        assert torch.equal(model(input_ids=ids).logits, on)
    assert not torch.allclose(on, tiny_model(layers=DEPTH)(ids).logits, atol=1e-4)
    assert any(p.requires_grad for p in model.parameters())


def test_targets_come_back_as_they_were(tmp_path: Path) -> None:
    targets = some_targets("abc")
    save_targets(targets, tmp_path)
    loaded = load_targets(tmp_path)
    assert (loaded.weights, loaded.layers, loaded.rows) == ("abc", LAYERS, targets.rows)
    for ours, theirs in zip(loaded.states, targets.states, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_targets_that_cannot_be_read_name_the_command(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "targets.safetensors").write_bytes(content)
    with pytest.raises(ProfileError, match=r"cannot be read .*--part reminder-states"):
        load_targets(tmp_path)


def test_a_run_without_targets_and_a_model_trained_whole_are_refused() -> None:
    with pytest.raises(ProfileError, match="reactivation"):
        SafeReactConfig().build(ProfileFiles())
    with pytest.raises(ModelError, match="a restoration is a LoRA"):
        Reactivation(SafeReactConfig(), some_targets()).bind(full_weights(tiny_model()))


def test_a_reference_of_another_width_is_refused() -> None:
    wide = tiny_model(layers=DEPTH, hidden=64)
    with pytest.raises(ProfileError, match="have 32 numbers, the model's 64"):
        Reactivation(SafeReactConfig(), some_targets()).forward_loss(wide, 0)


def test_states_that_are_not_finite_are_no_targets_and_stop_a_run() -> None:
    model = tiny_model(layers=DEPTH)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ProfileError, match="not finite"):
        reference_targets(model, [TargetRow([5, 6], [5, 6], 1)], CONFIG, weights="w")
    with pytest.raises(TrainingError, match=r"lower restore\.learning_rate"):
        Reactivation(SafeReactConfig(), some_targets()).forward_loss(model, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"steps": 0}, "steps"),
        ({"harmful_batch": 0}, "harmful_batch"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafeReactConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"layers": ()}, {"layers": (3, 1)}, {"domain_share": 1.5}, {"prompts": 0}],
)
def test_a_wrong_field_of_the_reference_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ReferenceConfig(**fields)


def test_half_a_character_at_the_cut_is_no_part_of_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = ["Sure, here is\ufffd", "I can't help with that."]
    monkeypatch.setattr("safeft.own_refusals.generate_greedy", lambda *_, **__: said)
    tokenizer = tiny_tokenizer()
    [row] = answered_rows(None, tokenizer, ["One?", "Two?"], ReferenceConfig(), silent)
    assert row.bare == row.reminded
    assert tokenizer.decode(row.bare).endswith("Sure, here is")

"""The stopped forward: the full model's hidden state, the same gradients, fewer layers run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from safeft.errors import ModelError
from safeft.stopped_forward import residual_after, resumed_at
from tests.tiny import tiny_model

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
}


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "llama": tiny_model(layers=4),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=4, n_head=4)
        ),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SHAPE)),
        "mistral": MistralForCausalLM(MistralConfig(**SHAPE)),
    }


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("layer", [0, 2])
def test_it_is_the_hidden_state_of_the_full_model(name: str, layer: int) -> None:
    model = models()[name].eval()
    ids, mask = batch()
    with torch.no_grad():
        full = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
        stopped = residual_after(model, layer, ids, mask)
        unmasked = residual_after(model, layer, ids)
    real = mask.bool()
    assert torch.equal(stopped[real], full[real])
    torch.testing.assert_close(unmasked[real], full[real])  # right padding is never visible


def test_the_last_layers_output_comes_before_the_final_norm() -> None:
    model = tiny_model(layers=3)
    ids, _ = batch()
    with torch.no_grad():
        raw = residual_after(model, 2, ids)
        normed = model.get_decoder()(ids).last_hidden_state
        torch.testing.assert_close(model.get_decoder().norm(raw), normed)
    assert not torch.allclose(raw, normed)


def test_later_layers_do_not_run_and_the_model_is_whole_afterwards() -> None:
    model = tiny_model(layers=4)
    ids, _ = batch()
    before = model(ids).logits
    ran: list[int] = []
    layers = model.get_decoder().layers
    hooks = [
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, module in enumerate(layers)
    ]
    residual_after(model, 1, ids)
    assert ran == [0, 1]
    for hook in hooks:
        hook.remove()
    assert model.get_decoder().layers is layers
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks for module in layers)


def test_a_forward_that_fails_leaves_the_model_whole() -> None:
    model = tiny_model(layers=3)
    layers = model.get_decoder().layers
    with pytest.raises(IndexError):
        residual_after(model, 1, torch.tensor([[10**6]]))
    assert model.get_decoder().layers is layers
    assert not layers[1]._forward_hooks


def lora(model: Any) -> Any:
    torch.manual_seed(2)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def gradients(model: Any, h: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    h.pow(2).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_a_lora_are_those_of_the_full_model() -> None:
    model = lora(tiny_model(layers=4))
    ids, mask = batch()
    expected = gradients(model, model(ids, attention_mask=mask, output_hidden_states=True)[-1][2])
    found = gradients(model, residual_after(model, 1, ids, mask))
    assert {n.split(".layers.")[1][0] for n in found} == {"0", "1"}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = lora(tiny_model(layers=4))
    ids, mask = batch()
    expected = gradients(model, residual_after(model, 2, ids, mask))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = gradients(model, residual_after(model, 2, ids, mask))
    assert set(found) == set(expected) and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_cached_prefix_gives_the_same_residuals() -> None:
    model = tiny_model(layers=3)
    ids, _ = batch()
    ids[:, :4] = ids[:1, :4]
    with torch.no_grad():
        whole = residual_after(model, 1, ids)
        cache = DynamicCache()
        residual_after(model, 1, ids[:1, :4], past_key_values=cache)
        cache.batch_repeat_interleave(len(ids))
        rest = residual_after(model, 1, ids[:, 4:], past_key_values=cache)
    torch.testing.assert_close(rest, whole[:, 4:])


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_the_model_does_not_have_is_named(layer: int) -> None:
    with pytest.raises(ModelError, match=rf"layer {layer}: .* 0 to 1"):
        residual_after(tiny_model(layers=2), layer, batch()[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_forward_that_is_resumed_ends_where_the_whole_one_does(name: str, layer: int) -> None:
    model = models()[name].eval()
    ids, _ = batch()
    whole = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        middle = residual_after(model, layer - 1, ids)
        with resumed_at(model, layer, middle):
            resumed = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(resumed, whole)


def test_a_resumed_forward_runs_no_earlier_layer_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model(layers=4)
    ids, _ = batch()
    whole = model(input_ids=ids).logits
    runs: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, at=at: runs.append(at))
        for at, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad(), resumed_at(model, 2, torch.zeros(3, 9, 32)):
        other = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    assert runs == [2, 3]
    assert not torch.allclose(other, whole)
    torch.testing.assert_close(model(input_ids=ids).logits, whole)

"""CWAC's activation penalty against an fp64 oracle that runs the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from safeft.constraints import ConstraintHooks, Cwac, CwacConfig
from safeft.constraints.activation import ActivationPenalty
from safeft.errors import ProfileError, TrainingError
from safeft.latents import ActivationTargets
from safeft.sae import TopKAutoencoder
from safeft.weights import full_weights
from tests.tiny import tiny_model

PROMPTS = [[5, 6, 7, 8, 9], [9, 8, 7], [11, 12, 13, 14], [20, 21, 22, 23, 24, 25]]
LAYER, POSITIONS, K = 0, 2, 6


def autoencoder(d: int = 32) -> TopKAutoencoder:
    torch.manual_seed(1)
    W = torch.randn(40, d)
    return TopKAutoencoder(W, torch.randn(40) * 0.1, W.T.contiguous(), torch.randn(d), K, LAYER)


def oracle_latents(model: nn.Module, prompt: list[int], latents: Tensor) -> Tensor:
    """(positions, m) fp64, from the model's own hidden states."""
    found = autoencoder()
    states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
    h = states[LAYER + 1][0, -POSITIONS:].double()  # hidden_states[0] are the embeddings
    pre = (h - found.b_dec.double()) @ found.W_enc.double().T + found.b_enc.double()
    kth = pre.topk(K, dim=-1).values[..., -1:]
    return torch.where(pre >= kth, pre.clamp_min(0), torch.zeros_like(pre))[..., latents]


def targets(**changed: object) -> ActivationTargets:
    base, latents = tiny_model(), torch.tensor([3, 0, 17, 21, 30, 8, 39])
    with torch.no_grad():
        baseline = torch.stack([oracle_latents(base, p, latents).float() for p in PROMPTS])
    settings = {
        "base_weights": "none",
        "autoencoder": autoencoder(),
        "latents": latents,
        "prompts": PROMPTS,
        "baseline": baseline,
        "positions": POSITIONS,
    }
    return ActivationTargets(**{**settings, **changed})  # type: ignore[arg-type]


def moved_model() -> nn.Module:
    model = tiny_model()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.train()


def test_the_base_model_pays_nothing() -> None:
    term = ActivationPenalty(targets(), lam=0.5, batch=4)(tiny_model(), 0)
    assert term.penalty == pytest.approx(0.0, abs=1e-9)
    assert term.metrics["latent_drift"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_value_and_gradient_equal_the_oracles(batch: int) -> None:
    found = targets()
    penalty = ActivationPenalty(found, lam=0.7, batch=batch)
    for step in range(3):
        model = moved_model()
        term = penalty(model, step)
        term.loss.backward()
        oracle = moved_model().double()
        terms = [
            (oracle_latents(oracle, PROMPTS[i], found.latents) - found.baseline[i]).pow(2).sum()
            for i in penalty.drawn(step)
        ]
        expected = 0.7 * torch.stack(terms).sum() / (batch * POSITIONS)
        expected.backward()
        assert term.penalty == pytest.approx(expected.item(), rel=1e-4)
        theirs = dict(oracle.named_parameters())
        for name, parameter in model.named_parameters():
            grad = theirs[name].grad
            if grad is None or not grad.any():
                assert parameter.grad is None or not parameter.grad.any(), name
                continue
            assert parameter.grad is not None, name
            difference = (parameter.grad.double() - grad).norm()
            assert difference <= 1e-3 * grad.norm(), name
        # The forward pass ended at the autoencoder's layer.
        assert model.get_parameter("model.layers.1.mlp.up_proj.weight").grad is None


def test_every_prompt_comes_before_any_comes_again() -> None:
    penalty = ActivationPenalty(targets(), lam=1.0, batch=3)
    drawn = [number for step in range(8) for number in penalty.drawn(step)]
    for start in range(0, 24, 4):
        assert sorted(drawn[start : start + 4]) == [0, 1, 2, 3]


def test_an_autoencoder_of_another_width_is_refused() -> None:
    penalty = ActivationPenalty(targets(autoencoder=autoencoder(24)), lam=1.0, batch=2)
    with pytest.raises(ProfileError, match="reads 24 numbers, the model's residual stream has 32"):
        penalty(tiny_model(), 0)


def test_a_nan_in_the_residual_stream_stops_the_run() -> None:
    model = tiny_model().train()
    layers = full_weights(model)
    activation = ActivationPenalty(targets(), lam=1.0, batch=2)
    hooks = ConstraintHooks([Cwac(CwacConfig(mode="activation_only"), None, activation)], layers)
    with torch.no_grad():
        layers["model.layers.0.mlp.down_proj"].W.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"constraint cwac: the activation penalty .* layer 0"):
        hooks.forward_loss(model, 0)

"""The autoencoder's training: its loss against plain fp64, its invariants, and what it streams."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeft.errors import ProfileError, TrainingError
from safeft.sae_trainer import AutoencoderTrainer, Weights, autoencoder_loss
from safeft.sae_training import (
    AutoencoderConfig,
    measure,
    measure_on_texts,
    train_autoencoder,
)
from tests.tiny import tiny_model

D, N, K = 8, 24, 3
SMALL = AutoencoderConfig(
    expansion=3,
    k=K,
    steps=60,
    batch_size=32,
    learning_rate=1e-2,
    buffer_tokens=200,
    dead_after=300,
    aux_k=4,
    min_variance_explained=0.0,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(count: int, tokens: int, seed: int = 0) -> Tensor:
    """(tokens, D): each the sum of two of some fixed directions, far from the origin."""
    directions = torch.nn.functional.normalize(normal(count, D, seed=99, dtype=torch.float32))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(count, (tokens, 2), generator=generator)
    sizes = 1 + torch.rand(tokens, 2, generator=generator)
    return 30 * (directions[chosen] * sizes[..., None]).sum(1) + 50


# The loss ---------------------------------------------------------------------------------------


def plain_loss(
    x: Tensor, w: list[Tensor], dead: list[int], aux_k: int, coefficient: float
) -> Tensor:
    """The published loss, dense and token by token."""
    W_enc, b_enc, atoms, b_dec = w
    pre = (x - b_dec) @ W_enc.T + b_enc

    def kept(row: Tensor, among: list[int], count: int) -> Tensor:
        best = sorted(among, key=lambda j: -float(row[j].detach()))[:count]
        mask = torch.zeros(len(row)).double()
        mask[best] = 1.0
        return row.clamp(min=0) * mask

    z = torch.stack([kept(row, list(range(N)), K) for row in pre])
    e = x - (z @ atoms + b_dec)
    loss = (e**2).sum() / ((x - x.mean(0)) ** 2).sum()
    if dead:
        e_hat = torch.stack([kept(row, dead, aux_k) for row in pre]) @ atoms
        e = e.detach()
        loss = loss + coefficient * ((e - e_hat) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
    return loss


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    dead=st.sets(st.integers(0, N - 1)),
    aux_k=st.integers(1, N),
    coefficient=st.sampled_from([0.0, 1 / 32, 1.0]),
)
def test_the_loss_and_its_gradient_are_the_published_ones(
    seed: int, dead: set[int], aux_k: int, coefficient: float
) -> None:
    x = normal(7, D, seed=seed)
    shapes = [(N, D), (N,), (N, D), (D,)]
    ours = [normal(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes)]
    plain = [t.detach().clone().requires_grad_() for t in ours]
    is_dead = torch.zeros(N, dtype=torch.bool)
    is_dead[sorted(dead)] = True
    loss = autoencoder_loss(x, Weights(*ours), K, is_dead, aux_k, coefficient)
    expected = plain_loss(x, plain, sorted(dead), aux_k, coefficient)
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    expected.backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    z = (x - ours[3]) @ ours[0].T + ours[1]
    best = z.topk(K, dim=-1)
    assert set(loss.fired.nonzero()[:, 0].tolist()) == set(
        best.indices[best.values > 0].flatten().tolist()
    )


# One training -----------------------------------------------------------------------------------


def trained(config: AutoencoderConfig, count: int = 12) -> AutoencoderTrainer:
    trainer = AutoencoderTrainer(features(count, 400), config, layer=1)
    for step in range(config.steps):
        trainer.step(features(count, config.batch_size, seed=step + 1))
    return trainer


def test_training_explains_held_out_activations_with_columns_of_norm_1() -> None:
    trainer = trained(replace(SMALL, steps=300))
    sae = trainer.autoencoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=0), torch.ones(N))
    assert sae.layer == 1
    reached = measure(sae, [features(12, 500, seed=10**6)])
    assert reached.variance_explained > 0.9
    assert reached.l0 <= K


def test_scaling_and_centring_are_folded_into_the_weights_exactly() -> None:
    trainer = trained(SMALL)
    sae = trainer.autoencoder()
    h = features(12, 50, seed=5)
    x = (h - trainer.mean) / trainer.scale
    W_enc, b_enc, atoms, b_dec = trainer.weights.tensors()
    pre = (x - b_dec) @ W_enc.T + b_enc
    values, indices = pre.topk(K, dim=-1)
    z = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    torch.testing.assert_close(sae.encode(h), z * trainer.scale, rtol=1e-4, atol=1e-3)
    inside = (z @ atoms + b_dec) * trainer.scale + trainer.mean
    torch.testing.assert_close(sae.decode(sae.encode(h)), inside, rtol=1e-4, atol=1e-3)


def test_the_encoder_starts_as_a_multiple_of_the_decoders_transpose() -> None:
    first = features(12, 400)
    trainer = AutoencoderTrainer(first, SMALL, layer=0)
    W_enc, b_enc, atoms, b_dec = (t.detach() for t in trainer.weights.tensors())
    multiple = W_enc[0] / atoms[0]
    torch.testing.assert_close(W_enc, atoms * multiple[0])
    assert not b_enc.any() and not b_dec.any()
    torch.testing.assert_close(trainer.autoencoder().b_dec, first.mean(0))
    # The multiple is the best one: x̂ is neither too long nor too short along x.
    x = (first - trainer.mean) / trainer.scale
    values, indices = (x @ W_enc.T).topk(K, dim=-1)
    x_hat = torch.zeros(len(x), N).scatter(-1, indices, values.relu()) @ atoms
    assert float((x * x_hat).sum() / x_hat.pow(2).sum()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(("coefficient", "revived"), [(1 / 32, True), (0.0, False)])
def test_dead_latents_come_back_to_life_by_the_auxiliary_loss(
    coefficient: float, revived: bool
) -> None:
    config = replace(SMALL, steps=400, aux_coefficient=coefficient, dead_after=100)
    trainer = AutoencoderTrainer(features(24, 400), config, layer=0)
    with torch.no_grad():
        trainer.weights.W_enc[: N // 2] *= 1e-3  # never among the k largest
    most = 0
    for step in range(config.steps):
        trainer.step(features(24, config.batch_size, seed=step + 1))
        most = max(most, int(trainer.dead[: N // 2].sum()))
    assert most > N // 4
    left = int(trainer.dead[: N // 2].sum())
    assert left <= most // 2 if revived else left == most


def test_a_training_that_diverges_says_so() -> None:
    trainer = AutoencoderTrainer(features(12, 100), SMALL, layer=0)
    with pytest.raises(TrainingError, match="step 1: lower learning_rate"):
        trainer.step(torch.full((4, D), float("nan")))


def test_activations_that_never_differ_are_nothing_to_train_on() -> None:
    with pytest.raises(ProfileError, match="all activations are the same"):
        AutoencoderTrainer(torch.ones(50, D), SMALL, layer=0)


def test_the_variance_explained_is_the_fraction_of_the_squared_distance_to_the_mean() -> None:
    sae = trained(SMALL).autoencoder()
    h = features(12, 300, seed=3)
    whole = measure(sae, torch.split(h, 77))  # type: ignore[no-untyped-call]
    h_hat = sae.decode(sae.encode(h)).double()
    distance = (h.double() - h.double().mean(0)).pow(2).sum()
    expected = 1 - (h.double() - h_hat).pow(2).sum() / distance
    assert whole.variance_explained == pytest.approx(float(expected), rel=1e-9)
    z = sae.encode(h)
    assert whole.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    assert whole.silent == pytest.approx(float((z == 0).all(0).float().mean()))
    assert whole.tokens == 300


def test_a_massive_activation_explains_nothing() -> None:
    sae = trained(SMALL).autoencoder()
    h = features(12, 300, seed=3)
    massive = torch.full((1, D), 1e5)
    with_it = measure(sae, [torch.cat([h, massive])], limit=1e4)
    assert with_it == measure(sae, [h])


def some_rows(count: int, seed: int = 0, shared: int = 3) -> list[list[int]]:
    chosen = random.Random(seed)
    return [
        [5] * shared + [chosen.randint(3, 60) for _ in range(chosen.randint(2, 9))]
        for _ in range(count)
    ]


# All of it --------------------------------------------------------------------------------------


def test_an_autoencoder_of_a_model_is_trained_and_reported() -> None:
    model, rows = tiny_model(layers=4).train(), some_rows(120)
    found = train_autoencoder(model, rows, replace(SMALL, expansion=2, k=8))
    report = found.report
    assert found.autoencoder.layer == 2  # half of the depth
    assert found.autoencoder.width == 64
    assert len(found.held_out) == 12
    assert report.held_out.tokens <= sum(len(rows[i]) - 3 for i in found.held_out)
    assert report.held_out.variance_explained > 0.5
    assert report.trained == 60 * 32
    assert [point.step for point in report.curve] == list(range(3, 61, 3))
    assert model.training
    again = train_autoencoder(model, rows, replace(SMALL, expansion=2, k=8))
    assert torch.equal(again.autoencoder.W_enc, found.autoencoder.W_enc)
    alone = [rows[i] for i in sorted(found.held_out)]
    # All but the few beginnings that held-out rows share with training rows.
    elsewhere = measure_on_texts(model, found.autoencoder, alone).variance_explained
    assert elsewhere == pytest.approx(report.held_out.variance_explained, abs=0.1)


def test_an_autoencoder_that_explains_too_little_is_not_taken() -> None:
    config = replace(SMALL, k=1, steps=2, min_variance_explained=0.9)
    with pytest.raises(
        ProfileError, match=r"explains .*held-out.*0\.9: raise k \(1\), steps \(2\)"
    ):
        train_autoencoder(tiny_model(layers=2), some_rows(40), config)


@pytest.mark.parametrize(
    ("change", "rows", "named"),
    [
        ({"layer": 2}, 20, "layer: 2, but the model's layers are 0 to 1"),
        ({"k": 500}, 20, "k: 500, but there are only 96 latents"),
        ({}, 1, "1 texts are too few"),
    ],
)
def test_what_the_model_or_the_texts_do_not_allow_is_named(
    change: dict[str, Any], rows: int, named: str
) -> None:
    with pytest.raises(ProfileError, match=named):
        train_autoencoder(tiny_model(layers=2), some_rows(rows), replace(SMALL, **change))


@pytest.mark.parametrize(
    "field",
    [
        {"depth": 1.0},
        {"layer": -1},
        {"expansion": 0},
        {"k": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup_steps": -1},
        {"decay": 1.5},
        {"steps": 0},
        {"batch_size": 0},
        {"buffer_tokens": 0},
        {"uses": 0.0},
        {"dead_after": 0},
        {"aux_k": 0},
        {"aux_coefficient": -1.0},
        {"held_out": 0.0},
        {"min_variance_explained": 1.0},
        {"positions": 0},
        {"latents": 0},
    ],
)
def test_a_setting_out_of_range_is_named(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        AutoencoderConfig(**field)

"""Safety-critical latents: ranked as stated, found where planted, stored with their baselines."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeft.errors import ProfileError
from safeft.latents import (
    STD_FLOOR,
    ActivationTargets,
    Ranking,
    activation_targets,
    last_residuals,
    load_activation_targets,
    rank_latents,
    save_activation_targets,
)
from safeft.sae import TopKAutoencoder
from safeft.stopped_forward import residual_after
from tests.tiny import tiny_model

D, N = 6, 20


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def autoencoder(d: int = D, n: int = N, k: int = 8, layer: int = 0) -> TopKAutoencoder:
    W = torch.nn.functional.normalize(normal(n, d))
    return TopKAutoencoder(W, normal(n, seed=1) / 10, W.T.contiguous(), normal(d, seed=2), k, layer)


def oracle_scores(sae: TopKAutoencoder, harmful: Tensor, benign: Tensor) -> list[float]:
    """The stated score of every latent, number by number."""
    groups = []
    for residuals in (harmful, benign):
        z = sae.encode(residuals).tolist()
        groups.append(
            [
                [sum(z[i][p][j] for p in range(len(z[i]))) / len(z[i]) for i in range(len(z))]
                for j in range(sae.width)
            ]
        )
    differences, spreads = [], []
    for values_h, values_b in zip(*groups, strict=True):
        mean_h, mean_b = sum(values_h) / len(values_h), sum(values_b) / len(values_b)
        squares = sum((v - mean_h) ** 2 for v in values_h)
        squares += sum((v - mean_b) ** 2 for v in values_b)
        spreads.append(math.sqrt(squares / (len(values_h) + len(values_b) - 2)))
        differences.append(mean_h - mean_b)
    varying = [s for s in spreads if s > 0]
    floor = STD_FLOOR * sum(varying) / len(varying)
    return [d / max(s, floor) for d, s in zip(differences, spreads, strict=True)]


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), m=st.integers(2, 40))
def test_the_ranking_is_the_stated_standardised_difference(seed: int, n: int, m: int) -> None:
    sae = autoencoder()
    harmful, benign = normal(n, 3, D, seed=seed) + 0.5, normal(m, 3, D, seed=seed + 1)
    expected = oracle_scores(sae, harmful, benign)
    count = min(4, sum(score > 1e-6 for score in expected))
    if not count:
        return
    ranking = rank_latents(sae, harmful, benign, count)
    found = ranking.scores.tolist()
    assert found == pytest.approx(sorted(expected, reverse=True)[:count], rel=1e-4)
    assert [expected[j] for j in ranking.latents] == pytest.approx(found, rel=1e-4)


def test_a_latent_that_is_planted_on_harmful_prompts_comes_first() -> None:
    sae = autoencoder(d=32, n=64, k=16)
    harmful, benign = normal(50, 4, 32, seed=3), normal(60, 4, 32, seed=4)
    planted = 17
    ranking = rank_latents(sae, harmful + 2 * sae.W_dec[:, planted], benign, 5)
    assert int(ranking.latents[0]) == planted
    assert float(ranking.scores[0]) > 2 * float(ranking.scores[1])


def test_latents_that_are_lower_on_harmful_prompts_are_never_taken() -> None:
    sae = autoencoder()
    harmful, benign = normal(30, 2, D, seed=3), normal(30, 2, D, seed=4)
    expected = oracle_scores(sae, harmful, benign)
    higher = sum(score > 0 for score in expected)
    assert rank_latents(sae, harmful, benign, higher).scores.min() > 0
    with pytest.raises(ProfileError, match=f"latents: {higher + 1}, but only {higher} are higher"):
        rank_latents(sae, harmful, benign, higher + 1)


def test_a_latent_that_hardly_varies_does_not_come_first_for_that() -> None:
    W = torch.eye(3)
    sae = TopKAutoencoder(W, torch.zeros(3), W, torch.zeros(3), k=3, layer=0)
    harmful, benign = normal(40, 1, 3, seed=1).abs(), normal(40, 1, 3, seed=2).abs()
    harmful[..., 1] += 3.0  # a real difference
    harmful[..., 2], benign[..., 2] = 1e-3, 0.0  # a constant but minute one
    assert rank_latents(sae, harmful, benign, 2).latents.tolist()[0] == 1


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 1)])
def test_one_prompt_is_no_group(n: int, m: int) -> None:
    with pytest.raises(ProfileError, match="at least 2"):
        rank_latents(autoencoder(), normal(n, 1, D), normal(m, 1, D), 1)


# Of a model -------------------------------------------------------------------------------------

PROMPTS = [[4 + (7 * i + j * j) % 50 for j in range(5 + i % 4)] for i in range(40)]


def targets(seed: int = 0) -> ActivationTargets:
    model = tiny_model(seed, layers=3)
    sae = autoencoder(d=32, n=48, k=12, layer=1)
    residuals = last_residuals(model, 1, PROMPTS, 3)
    ranking = Ranking(torch.tensor([40, 3, 17, 5]), torch.ones(4))
    return activation_targets("weights", sae, ranking, PROMPTS, residuals)


def test_residuals_are_those_of_each_prompt_alone_at_its_last_positions() -> None:
    model = tiny_model(layers=3)
    found = last_residuals(model, 1, PROMPTS, 4)
    assert found.shape == (40, 4, 32)
    with torch.no_grad():
        for prompt, residuals in zip(PROMPTS, found, strict=True):
            alone = residual_after(model, 1, torch.tensor([prompt]))[0, -4:]
            torch.testing.assert_close(residuals, alone, atol=1e-5, rtol=1e-4)


def test_the_base_model_itself_is_at_no_distance_and_another_one_is() -> None:
    base = targets()
    assert base.baseline.abs().sum() > 0
    for seed, moved in ((0, False), (1, True)):
        model = tiny_model(seed, layers=3)
        distance = 0.0
        for prompt, baseline in zip(base.prompts, base.baseline, strict=True):
            with torch.no_grad():
                h = residual_after(model, 1, torch.tensor([prompt]))[0, -base.positions :]
            z = base.autoencoder.encode_latents(h, base.latents)
            distance += float((z - baseline).pow(2).sum())
        assert (distance > 1e-2) if moved else (distance < 1e-8)


def test_a_prompt_shorter_than_the_positions_is_refused() -> None:
    with pytest.raises(ProfileError, match="positions: 6, but a prompt has only 5 tokens"):
        last_residuals(tiny_model(), 0, PROMPTS, 6)


def test_targets_come_back_as_they_were_saved(tmp_path: Path) -> None:
    made = targets()
    save_activation_targets(made, tmp_path, model_name="tiny")
    back = load_activation_targets(tmp_path)
    assert back.base_weights == "weights"
    assert (back.positions, back.prompts) == (3, PROMPTS)
    assert torch.equal(back.latents, made.latents) and back.latents.dtype == torch.int64
    assert torch.equal(back.baseline, made.baseline) and back.baseline.dtype == torch.float32
    assert torch.equal(back.autoencoder.W_enc, made.autoencoder.W_enc)
    assert (back.autoencoder.k, back.autoencoder.layer) == (12, 1)
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")]


BROKEN = {
    "latents": torch.tensor([40, 3, 17, 48]),  # 48 latents end at 47
    "prompt_lengths": torch.full((40,), 3),
    "baseline": torch.full((40, 3, 4), float("nan")),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_targets_that_do_not_fit_together_are_refused(tmp_path: Path, name: str) -> None:
    save_activation_targets(targets(), tmp_path)
    file = tmp_path / "targets.safetensors"
    metadata = {"format": "safeft.activation_targets.1", "base_weights": "weights"}
    save_file({**load_file(file), name: BROKEN[name]}, file, metadata=metadata)
    with pytest.raises(ProfileError, match=r"targets\.safetensors.*--part autoencoder"):
        load_activation_targets(tmp_path)


def test_twice_the_same_latent_is_refused(tmp_path: Path) -> None:
    made = targets()
    save_activation_targets(replace(made, latents=torch.tensor([3, 3, 17, 5])), tmp_path)
    with pytest.raises(ProfileError, match="latents are not those"):
        load_activation_targets(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_missing_or_broken_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    save_activation_targets(targets(), tmp_path)
    file = tmp_path / "targets.safetensors"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ProfileError, match="--part autoencoder"):
        load_activation_targets(tmp_path)


def test_another_safetensors_file_in_its_place_is_refused(tmp_path: Path) -> None:
    save_activation_targets(targets(), tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "targets.safetensors")
    with pytest.raises(ProfileError, match="does not hold activation targets"):
        load_activation_targets(tmp_path)

"""The attack on the score lowers it where it can, and keeps what it is told to keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.score_attack import KEPT_LOSS, AttackConfig, ScoreAttack, Where
from safeft.data import TokenisedRow
from safeft.models import load_model
from safeft.profile import SafetyProfile
from safeft.sqsd import SqsdScorer
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

ROW = TokenisedRow(1, [4, 20, 30, 2, 40, 50, 60, 70, 2], [-100] * 5 + [50, 60, 70, 2])


@pytest.fixture
def profile(tiny_dir: Path, tmp_path: Path) -> SafetyProfile:
    return write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=0.0)


def attack_on(tiny_dir: Path, profile: SafetyProfile) -> ScoreAttack:
    danger, safety = profile.danger(), profile.safety()
    scorer = SqsdScorer(load_model(tiny_dir), danger, safety, pad_token_id=0)
    config = AttackConfig(tokens=3, steps=4, candidates=8, top=16)
    allowed = list(range(10, 200))
    return ScoreAttack(load_model(tiny_dir), scorer, danger, safety, allowed, config)


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_the_attack_lowers_the_exact_score_and_keeps_the_loss(
    tiny_dir: Path, profile: SafetyProfile, where: Where
) -> None:
    attack = attack_on(tiny_dir, profile)
    done = attack.attack(ROW, where)
    assert done.after < done.before - 0.05
    assert done.loss_after >= KEPT_LOSS * done.loss_before
    assert attack.scorer.score([done.row])[0].score == pytest.approx(done.after, abs=1e-4)
    kept = [t for t, label in zip(done.row.input_ids, done.row.labels, strict=True)]
    assert len(kept) == len(ROW.input_ids) + 3
    trained = [label for label in done.row.labels if label != -100]
    assert len(trained) == 4 + (3 if where == "answer" else 0)


def test_the_slope_is_that_of_the_score_of_one_module_without_its_norm(
    tiny_dir: Path, profile: SafetyProfile
) -> None:
    # With one unit direction D the finite difference is 2 <grad L, D>: its own oracle, by autograd.
    attack = attack_on(tiny_dir, profile)
    name = next(iter(attack.along))
    attack.along = {name: 0.01 * attack.along[name]}
    attack.modules = {name: attack.modules[name]}
    attack.merged = {name: attack.merged[name]}
    # The fast attention kernel has no second derivative.
    with attack._weights(0.0), sdpa_kernel(SDPBackend.MATH):
        weight = attack.modules[name].weight
        embeds = attack.embedding[ROW.input_ids].clone().requires_grad_()
        weight.requires_grad_(True)
        (gradient,) = torch.autograd.grad(attack._nll(ROW, embeds), weight, create_graph=True)
        (exact,) = torch.autograd.grad((gradient * 2 * attack.along[name]).sum(), embeds)
        weight.requires_grad_(False)
    found = attack._slope(ROW)
    error = (found - exact).norm() / exact.norm()
    assert error < 0.05

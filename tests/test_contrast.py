"""Harmful subspaces without what benign inputs share with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.profile import AnswersConfig, ProfileConfig, RefusalsConfig, build_profile
from safeft.constraints import CwacConfig, ProfileFiles
from safeft.constraints.contrast import contrasted, load_benign_inputs
from safeft.constraints.covariance import InputCovariances, InputSite, read_row
from safeft.constraints.subspaces import load_subspaces
from safeft.errors import ProfileError
from safeft.lora import lora_pairs
from safeft.models import load_model, load_tokenizer, weights_hash
from safeft.own_refusals import load_answers
from tests.test_constraints import tiny_lora
from tests.test_restore import speech

__all__ = ["speech"]  # a fixture


def covariance(generator: torch.Generator, d: int) -> Tensor:
    X = torch.randn(d, 3 * d, generator=generator, dtype=torch.float64)
    return X @ X.T / (3 * d)


@settings(max_examples=40)
@given(d=st.integers(2, 12), contrast=st.floats(0.2, 5.0), seed=st.integers(0, 2**16))
def test_what_is_left_free_changes_harmful_outputs_less_and_as_much_as_can_be_is_left_free(
    d: int, contrast: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    H, B = covariance(generator, d), covariance(generator, d)
    values, vectors = torch.linalg.eigh(H)
    values, U = values.flip(0), vectors.flip(1)
    found = contrasted(U.float(), values, U.T @ B @ U, contrast).double()
    assert torch.allclose(found.T @ found, torch.eye(found.shape[1]).double(), atol=1e-5)
    # By another way: the eigenvalues of B⁻¹H itself, which is not symmetric.
    ratios = torch.linalg.eigvals(torch.linalg.solve(B, H)).real
    if (ratios - contrast).abs().min() > 1e-3 * contrast:
        assert found.shape[1] == int((ratios >= contrast).sum())
    free = torch.eye(d).double() - found @ found.T
    for v in torch.randn(5, d, generator=generator, dtype=torch.float64):
        a = free @ v
        assert a @ H @ a <= contrast * (a @ B @ a) * (1 + 1e-4) + 1e-6


def test_equal_inputs_have_no_contrast_and_inputs_elsewhere_leave_all() -> None:
    U, used = torch.eye(6)[:, :3], torch.tensor([4.0, 2.0, 1.0])
    assert contrasted(U, used, used.diag(), 1.01).shape == (6, 0)
    nowhere = torch.zeros(3, 3)
    everything = contrasted(U, used, nowhere, 100.0)
    assert torch.allclose(everything @ everything.T, U @ U.T, atol=1e-6)
    one = contrasted(U, used, torch.tensor([8.0, 0.0, 2.0]).diag(), 1.0)
    assert torch.allclose(one.abs(), U[:, 1:2], atol=1e-6)


CONFIG = ProfileConfig(refusals=RefusalsConfig(prompts=20), answers=AnswersConfig(prompts=4))


def test_a_profile_holds_them_in_the_coordinates_of_its_harmful_subspaces(
    tiny_dir: Path, tmp_path: Path, speech: Any, local_ray: None
) -> None:
    profile = build_profile(
        tiny_dir, None, root=tmp_path / "profile", config=CONFIG, parts=["benign-inputs"]
    )
    path = profile.path("benign-inputs")
    benign, harmful = load_benign_inputs(path), load_subspaces(profile.path("harmful-inputs"))
    assert benign.base_weights == weights_hash(tiny_dir)
    name = harmful.module_names[0]
    for positions in ("prompt", "response", "both"):
        k = len(harmful.energies(name, positions))
        shared = benign.shared(name, positions)
        assert shared.shape == (k, k) and torch.allclose(shared, shared.T, atol=1e-6)
        assert torch.linalg.eigvalsh(shared.double()).min() > -1e-6
    read = InputCovariances([InputSite((name,), harmful.basis(name, "both", 0.5, None).shape[0])])
    tokenizer, answers = load_tokenizer(tiny_dir), load_answers(profile.path("answers"))
    read.read(load_model(tiny_dir), [read_row(tokenizer, one) for one in answers], 0)
    U, C = harmful.basis(name, "both", harmful.energy, None).double(), read.total(name, "both")
    expected = (U.T @ C.matrix @ U / C.tokens).float()
    assert torch.allclose(benign.shared(name, "both"), expected, rtol=1e-4, atol=1e-6)
    files = ProfileFiles(harmful_inputs=profile.path("harmful-inputs"), benign_inputs=path)
    settings: dict[str, Any] = {"mode": "weight_only", "layers": "all-linear", "positions": "both"}
    layers = lora_pairs(tiny_lora(targets=("q_proj", "down_proj")))
    ranks = {}
    for contrast in (None, 1e-9, 1.0):
        constraint = CwacConfig(contrast=contrast, **settings).build(files)
        constraint.bind(layers)
        ranks[contrast] = [U.shape[1] for U in constraint.update_bases().values()]
    assert ranks[None] == ranks[1e-9] and sum(ranks[1.0]) < sum(ranks[None])
    with pytest.raises(ProfileError, match="holds no benign inputs of lm_head"):
        benign.shared("lm_head", "both")
    (path / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ProfileError, match="--part benign-inputs"):
        load_benign_inputs(path)


def test_only_a_run_that_contrasts_needs_the_part() -> None:
    plain, contrasting = CwacConfig(contrast=None), CwacConfig()
    assert plain.parts == ("harmful-inputs",)
    assert contrasting.parts == ("harmful-inputs", "benign-inputs")
    with pytest.raises(ValueError, match="contrast must be positive"):
        CwacConfig(contrast=0.0)

"""The random control of CWAC's projection against an fp64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.spec import FinetuneSpec
from safeft.constraints import (
    ConstraintHooks,
    ProfileFiles,
    RandomSubspace,
    RandomSubspaceConfig,
)
from safeft.errors import ProfileError
from safeft.lora import lora_pairs
from safeft.weights import TrainedLayers
from tests.test_cwac import Subspaces, farthest, lora_model, oracle_adamw, train
from tests.tinyjob import make_spec


def control(trained: TrainedLayers, seed: int = 0, k: int = 5) -> tuple[RandomSubspace, Subspaces]:
    subspaces = Subspaces(trained, k)
    config = RandomSubspaceConfig(layers="all-linear", seed=seed)
    return RandomSubspace(config, subspaces), subspaces  # type: ignore[arg-type]


def bases(trained: TrainedLayers, seed: int = 0, k: int = 5) -> dict[str, Tensor]:
    constraint, _ = control(trained, seed, k)
    constraint.bind(trained)
    return dict(constraint.update_bases())


def test_the_random_directions_are_as_many_and_orthonormal_and_nothing_but_random() -> None:
    pairs = lora_pairs(lora_model("q_proj", "down_proj"))
    U, again, others = bases(pairs), bases(pairs), bases(pairs, seed=1)
    harmful = control(pairs)[1].U
    assert set(U) == set(pairs)
    for name, basis in U.items():
        assert basis.shape == harmful[name].shape and basis.dtype == torch.float32
        assert torch.allclose(basis.T @ basis, torch.eye(5), atol=1e-6)
        assert torch.equal(basis, again[name])
        k, d = basis.shape[1], basis.shape[0]
        for other in (harmful[name], others[name]):
            overlap = float((basis.T @ other).pow(2).sum()) / k  # k/d expected, 1 if the same
            assert overlap < 0.5 < 1 - k / d
    names = list(U)
    assert len({basis[0, 0].item() for basis in U.values()}) == len(names)


def test_a_run_under_the_control_equals_the_oracle_that_projects_a() -> None:
    model = lora_model("q_proj", "down_proj").train()
    pairs = lora_pairs(model)
    U = bases(pairs)
    oracle = lora_model("q_proj", "down_proj").train().double()

    def after(parameters: dict[str, Tensor]) -> None:
        for name, basis in U.items():
            A, u = parameters[f"base_model.model.{name}.lora_A.default.weight"], basis.double()
            A.copy_(A @ (torch.eye(len(u)).double() - u @ u.T))

    with torch.no_grad():
        after(dict(oracle.named_parameters()))
    hooks = ConstraintHooks([control(pairs)[0]], pairs)
    train(model, 6, hooks)
    oracle_adamw(oracle, 6, after=after)
    assert farthest(model, oracle) < 2e-6
    hooks.before_backward(1)
    assert hooks.metrics()["random-subspace/weight_drift"] < 1e-5


def test_the_control_needs_the_profile_for_its_ranks_and_says_how_to_make_it() -> None:
    with pytest.raises(ProfileError, match=r"random-subspace needs .*--part harmful-inputs"):
        RandomSubspaceConfig().build(ProfileFiles())


@pytest.mark.parametrize("wrong", [{"energy": 0.0}, {"rank": 0}])
def test_a_setting_out_of_range_names_its_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RandomSubspaceConfig(**wrong)


def test_a_job_spec_may_ask_for_the_control(tmp_path: Any) -> None:
    constraints = [{"kind": "random-subspace", "positions": "both"}]
    spec = make_spec(tmp_path, lora=None, constraints=constraints)
    assert spec.constraints == (RandomSubspaceConfig(positions="both"),)
    assert FinetuneSpec.model_validate_json(spec.model_dump_json()) == spec

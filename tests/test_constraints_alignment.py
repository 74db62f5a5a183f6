"""The alignment direction: paired by name, exact, and honest about models that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from safeft.constraints import Asft, AsftConfig, ConstraintHooks
from safeft.constraints.alignment import (
    SIGNED,
    alignment_direction,
    load_directions,
    save_directions,
)
from safeft.errors import ModelError, ProfileError

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.0.mlp.down_proj"


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    return {
        f"{Q}.weight": normal(32, 32),
        f"{Q}.bias": normal(32),  # biases break a pairing by position
        f"{V}.weight": normal(16, 32),
        f"{DOWN}.weight": normal(32, 64),
        "model.norm.weight": normal(32),
    }


def write(directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    directory.mkdir()
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[index::shards]}
        save_file(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return directory


def moved(by: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    tensors = weights(seed)
    for name, delta in by.items():
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + delta
    return tensors


def paper_C(difference: Tensor) -> Tensor:
    difference = difference.double()
    return difference @ difference.T / difference.pow(2).sum().sqrt()


def test_the_papers_matrix_follows_from_the_direction_to_fp32(tmp_path: Path) -> None:
    torch.manual_seed(1)
    deltas = {
        Q: torch.randn(32, 32),  # full rank
        V: torch.randn(16, 3) @ torch.randn(3, 32) * 0.05,  # a merged LoRA, wide
        DOWN: torch.randn(32, 2) @ torch.randn(2, 64) * 1e-3,
    }
    aligned = write(tmp_path / "aligned", moved(deltas), shards=3)
    unaligned = write(tmp_path / "unaligned", weights())
    found = alignment_direction(aligned, unaligned, [Q, V, DOWN])
    assert [found[name].U.shape[1] for name in (Q, V, DOWN)] == [32, 3, 2]
    for name in (Q, V, DOWN):
        difference = moved(deltas)[f"{name}.weight"] - weights()[f"{name}.weight"]
        U, values = found[name].U.double(), found[name].singular_values.double()
        C = U @ (values.pow(2) / values.pow(2).sum().sqrt()).diag() @ U.T
        assert (C - paper_C(difference)).abs().max() < 1e-6
        assert (U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-5
        right = found[name].right
        assert right is not None
        whole = U @ values.diag() @ right.double()
        assert (whole - difference.double()).norm() < 1e-4 * difference.norm()


def test_a_tall_weight_gives_orthonormal_columns(tmp_path: Path) -> None:
    base = {f"{Q}.weight": torch.zeros(48, 8)}
    tuned = {f"{Q}.weight": torch.randn(48, 8, generator=torch.Generator().manual_seed(0))}
    found = alignment_direction(write(tmp_path / "a", tuned), write(tmp_path / "u", base), [Q])[Q]
    assert (found.U.T @ found.U - torch.eye(8)).abs().max() < 1e-5
    expected = torch.linalg.svdvals(tuned[f"{Q}.weight"].double())
    assert torch.allclose(found.singular_values.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("rank", [5, 100])
def test_large_layers_have_the_singular_values_of_an_svd(rank: int, tmp_path: Path) -> None:
    """Rank 5 takes the sketch, rank 100 does not fit into it."""
    torch.manual_seed(0)
    base = {f"{Q}.weight": torch.randn(260, 200)}
    tuned = {f"{Q}.weight": base[f"{Q}.weight"] + torch.randn(260, rank) @ torch.randn(rank, 200)}
    found = alignment_direction(write(tmp_path / "a", tuned), write(tmp_path / "u", base), [Q])[Q]
    difference = tuned[f"{Q}.weight"].double() - base[f"{Q}.weight"].double()
    U, values, _ = torch.linalg.svd(difference, full_matrices=False)
    assert found.U.shape == (260, rank)
    assert torch.allclose(found.singular_values.double(), values[:rank], rtol=1e-6)
    assert (found.U.double() @ found.U.T.double() - U[:, :rank] @ U[:, :rank].T).abs().max() < 1e-5
    assert found.right is not None and len(found.right) == min(rank, SIGNED)
    assert (found.right @ found.right.T - torch.eye(len(found.right))).abs().max() < 1e-5


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    seen = []
    aligned = write(tmp_path / "a", moved({Q: torch.ones(32, 32)}))
    alignment_direction(
        aligned,
        write(tmp_path / "u", weights()),
        lambda name: name.endswith("_proj"),
        lambda label, done, total: seen.append((done, total)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{V}.weight"), rf"holds no tensor {V}\.weight"),
        (lambda t: t.update({f"{V}.weight": torch.zeros(16, 31)}), r"shape .*\(16, 32\).*16, 31"),
        (lambda t: t[f"{V}.weight"].fill_(float("inf")), "NaN or an infinity"),
        (lambda t: t.update({f"{V}.weight": torch.zeros(16)}), "is not a matrix"),
    ],
)
def test_models_that_do_not_fit_name_the_tensor(change, message: str, tmp_path: Path) -> None:
    broken = weights()
    change(broken)
    aligned = write(tmp_path / "a", moved({Q: torch.ones(32, 32)}))
    with pytest.raises(ModelError, match=message):
        alignment_direction(aligned, write(tmp_path / "u", broken), [Q, V])


def test_two_equal_models_have_no_direction(tmp_path: Path) -> None:
    same = write(tmp_path / "a", weights()), write(tmp_path / "u", weights())
    with pytest.raises(ProfileError, match="hold the same weights in all 2 modules"):
        alignment_direction(*same, [Q, V])


def test_a_layer_that_alignment_left_alone_is_held_by_plain_l2(tmp_path: Path) -> None:
    from tests.test_constraints import pair_of

    aligned = write(tmp_path / "a", moved({Q: torch.ones(32, 32)}))
    found = alignment_direction(aligned, write(tmp_path / "u", weights()), [Q, V])
    assert found[V].U.shape == (16, 0)
    torch.manual_seed(0)
    A, B = torch.randn(2, 32), torch.randn(16, 2)
    for anchor in ("paper", "projector"):
        hooks = ConstraintHooks(
            [Asft(AsftConfig(lam=1.0, anchor=anchor), found)],
            {V: pair_of(V, A.clone(), B.clone(), 1.0)},
        )
        expected = float((B.double() @ A.double()).pow(2).sum())
        assert hooks.before_backward(1)["asft"] == pytest.approx(expected, rel=1e-6)


def test_directions_survive_the_file(tmp_path: Path) -> None:
    aligned = write(tmp_path / "a", moved({Q: torch.randn(32, 32)}))
    found = alignment_direction(aligned, write(tmp_path / "u", weights()), [Q, V])
    save_directions(found, tmp_path, aligned_hash="ab" * 32)
    loaded = load_directions(tmp_path)
    assert loaded.aligned_hash == "ab" * 32
    assert list(loaded) == [Q, V]
    for name in found:
        assert torch.equal(loaded[name].U, found[name].U)
        assert torch.equal(loaded[name].singular_values, found[name].singular_values)
        right, expected = loaded[name].right, found[name].right
        assert right is not None and expected is not None and torch.equal(right, expected)


def test_a_truncated_or_foreign_file_is_a_profile_error(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    with pytest.raises(ProfileError, match=r"part/directions\.safetensors: .*profile build"):
        load_directions(part)
    aligned = write(tmp_path / "a", moved({Q: torch.ones(32, 32)}))
    other = (aligned / "model.safetensors").read_bytes()
    (part / "directions.safetensors").write_bytes(other)
    with pytest.raises(ProfileError, match="does not hold alignment directions"):
        load_directions(part)
    (part / "directions.safetensors").write_bytes(other[:1000])
    with pytest.raises(ProfileError, match="profile build"):
        load_directions(part)

"""Constraints on shards against dense fp64 forms on whole matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeft.constraints.anchored import AnchoredPenalty
from safeft.constraints.base import Anchor
from safeft.constraints.projection import UpdateProjection
from safeft.constraints.shards import MatrixShard, Origin, RankGroup, UpdateShard
from tests.ranks import cut, on_ranks, whole


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int], int]:
    """W0 and ΔW of a few matrices, and where 1 to 4 ranks cut the flat buffer: anywhere."""
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
    W0 = {f"m{i}": torch.randn(*shape, generator=generator) for i, shape in enumerate(shapes)}
    delta = {name: 0.1 * torch.randn(W.shape, generator=generator) for name, W in W0.items()}
    size = sum(W.numel() for W in W0.values())
    cuts = draw(st.lists(st.integers(0, size), min_size=0, max_size=3))
    return W0, delta, cuts, seed


def orthonormal(rows: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, rows, generator=generator).double())[0][:, :k].float()


def moved(
    W0: dict[str, Tensor], delta: dict[str, Tensor], cuts: list[int]
) -> tuple[list[list[MatrixShard]], list[dict[str, Origin]]]:
    """Shards that hold W0 + ΔW, and the origins that were taken before they moved."""
    ranks = cut(W0, cuts)
    origins = [{shard.name: Origin(shard.values) for shard in shards} for shards in ranks]
    for shards in ranks:
        for shard in shards:
            change = delta[shard.name].reshape(-1)
            shard.values.add_(change[shard.start : shard.start + shard.values.numel()])
    return ranks, origins


@settings(max_examples=150)
@given(layout=layouts(), k=st.integers(1, 9))
def test_projecting_shards_equals_projecting_the_whole_update(
    layout: tuple[dict[str, Tensor], dict[str, Tensor], list[int], int], k: int
) -> None:
    W0, delta, cuts, seed = layout
    bases = {
        name: orthonormal(W.shape[1], min(k, W.shape[1]), seed + i)
        for i, (name, W) in enumerate(W0.items())
    }
    ranks, origins = moved(W0, delta, cuts)

    def work(rank: int, group: RankGroup) -> tuple[float, float] | None:
        projection = UpdateProjection(bases)
        projection.apply(ranks[rank], origins[rank], group)
        return projection.drift(ranks[rank], origins[rank], group)

    drifts = on_ranks(len(ranks), work)
    after = whole(ranks)
    inside = total = 0.0
    for name, W in W0.items():
        U = bases[name].double()
        expected = delta[name].double() - delta[name].double() @ U @ U.T
        left = after[name].double() - W.double()
        assert (left - expected).abs().max() < 2e-6
        inside += float((left @ U).pow(2).sum())
        total += float(left.pow(2).sum())
        # Of the weight that was read: where W0 is nearly 0 beside ΔW, W0 + ΔW was rounded to more.
        read = max(float(W.norm()), float((W + delta[name]).norm()))
        rounding = 4 * torch.finfo(torch.float32).eps * read
        assert (left @ U).norm() <= 1e-5 * left.norm() + rounding  # methods.md's invariant
    assert len(set(drifts)) == 1
    if total == 0:
        assert drifts[0] is None
        return
    assert drifts[0] is not None
    drift, limit = drifts[0]
    assert drift == pytest.approx((inside / total) ** 0.5, rel=1e-2, abs=1e-7)
    assert drift <= limit
    weights = sum(float(W.double().pow(2).sum()) for W in after.values())
    rounding = 4 * torch.finfo(torch.float32).eps * (weights / total) ** 0.5
    assert limit == pytest.approx(1e-5 + rounding, rel=1e-3)


@settings(max_examples=150)
@given(layout=layouts(), k=st.integers(0, 9), lam=st.floats(0, 3))
def test_the_penalty_and_its_gradient_on_shards_equal_the_dense_form(
    layout: tuple[dict[str, Tensor], dict[str, Tensor], list[int], int], k: int, lam: float
) -> None:
    W0, delta, cuts, seed = layout
    anchors = {}
    for i, (name, W) in enumerate(W0.items()):
        U = orthonormal(W.shape[0], min(k, W.shape[0]), seed + i)
        anchors[name] = Anchor(lam, U, torch.linspace(1.2, 0.1, U.shape[1]))
    ranks, origins = moved(W0, delta, cuts)

    def work(rank: int, group: RankGroup) -> tuple[Tensor, dict[str, Tensor], float]:
        penalty = AnchoredPenalty(anchors)
        updates = [UpdateShard(s, origins[rank][s.name].update_of(s)) for s in ranks[rank]]
        values = penalty.measure(updates, group)
        own = {}
        for update in updates:
            gradient = penalty.gradient(update)
            assert gradient is not None
            own[update.shard.name] = update.shard.from_rows(gradient)
        return values, own, penalty.orthogonal_norm

    results = on_ranks(len(ranks), work)
    for index, (name, W) in enumerate(W0.items()):
        anchor = anchors[name]
        C = (anchor.U * anchor.c).double() @ anchor.U.double().T
        start = (W + delta[name]).double()
        dW = (start - W.double()).requires_grad_()
        dense = lam * (dW - C @ dW).pow(2).sum()
        (expected,) = torch.autograd.grad(dense, dW)
        scale = lam * float(dW.detach().pow(2).sum()) + 1e-12
        got = torch.full((W.numel(),), float("nan"))
        for shards, (values, own, _) in zip(ranks, results, strict=True):
            assert abs(float(values[index]) - dense.item()) <= 1e-5 * scale
            held = shards[index]
            got[held.start : held.start + held.values.numel()] = own[name]
        assert (got.double() - expected.view(-1)).abs().max() <= 1e-5 * max(scale**0.5, 1.0)


@given(seed=st.integers(0, 2**16))
def test_an_update_is_exact_whatever_w0_is_kept_in(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(4, 6, generator=generator)
    for stored in (start, start.bfloat16().float()):
        shard = MatrixShard("m", 4, 6, 0, stored.reshape(-1).clone())
        origin = Origin(shard.values)
        assert not origin.update_of(shard).any()
        shard.values.mul_(2)
        assert torch.equal(origin.update_of(shard), stored)


def test_w0_of_a_model_stored_in_bf16_is_kept_in_bf16() -> None:
    assert Origin(torch.randn(64).bfloat16().float()).values.dtype == torch.bfloat16
    assert Origin(torch.randn(64)).values.dtype == torch.float32

"""Quadratic penalties on layers that are trained whole, computed on shards.

``f = λ·‖(I − C)·ΔW‖_F²`` with ``C = U·diag(c)·Uᵀ`` and U's columns orthonormal. With
``S = Uᵀ·ΔW`` (k × d_in, one sum over the ranks for all layers together) and ``w = 2c − c²``:

    f = λ·(‖ΔW‖_F² − Σ_j w_j·‖S_j‖²),   ∂f/∂ΔW = 2λ·(ΔW − U·(w ∘ S))

and each rank needs the gradient of its own rows only. Source: AsFT, arXiv 2506.08473, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safeft.constraints.base import Anchor
from safeft.constraints.shards import RankGroup, UpdateShard, left_products


class AnchoredPenalty:
    """The anchors of one constraint, over all layers it covers."""

    def __init__(self, anchors: Mapping[str, Anchor]) -> None:
        self._anchors = dict(anchors)
        self._products: dict[str, Tensor] = {}  # w ∘ S of each layer, until the next `measure`
        self.update_norm = 0.0
        self.orthogonal_norm = 0.0

    def measure(self, updates: Sequence[UpdateShard], group: RankGroup) -> Tensor:
        """The penalty of each covered layer ``(L,)`` fp64, and what `gradient` needs.

        Args:
            updates: of every trained layer; those not covered are ignored. All ranks call alike.
        """
        covered = [u for u in updates if u.shard.name in self._anchors]
        anchors = [self._to(u.delta.device, u.shard.name) for u in covered]
        products, squares = left_products(covered, [anchor.U for anchor in anchors], group)
        free = []
        for update, anchor, S in zip(covered, anchors, products, strict=True):
            w = (2 * anchor.c - anchor.c.pow(2))[:, None]
            free.append((w * S.pow(2)).double().sum())
            self._products[update.shard.name] = S.mul_(w)
        held = squares.double() - torch.stack(free)
        self.update_norm = float(squares.double().sum().sqrt())
        self.orthogonal_norm = float(held.sum().clamp_min(0).sqrt())
        return held * torch.tensor([anchor.lam for anchor in anchors], device=held.device)

    def gradient(self, update: UpdateShard) -> Tensor | None:
        """``∂f/∂ΔW`` of the held rows ``(m, d_in)``; None: the layer is not covered."""
        name = update.shard.name
        if name not in self._anchors:
            return None
        anchor = self._anchors[name]
        along = anchor.U[update.shard.held_rows] @ self._products[name]
        return (update.delta - along).mul_(2 * anchor.lam)

    def covered(self, updates: Sequence[UpdateShard]) -> list[str]:
        """Names of the covered layers, in the order of `measure`'s values."""
        return [u.shard.name for u in updates if u.shard.name in self._anchors]

    def _to(self, device: torch.device, name: str) -> Anchor:
        anchor = self._anchors[name]
        if anchor.U.device != device:  # the model moved after bind: follow it, once
            anchor = Anchor(anchor.lam, anchor.U.to(device), anchor.c.to(device))
            self._anchors[name] = anchor
        return anchor

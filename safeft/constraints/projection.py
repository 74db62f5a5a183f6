"""Keeping updates out of a subspace: ``ΔW ← ΔW·(I − U·Uᵀ)`` on shards, after the optimizer's step.

Source: CWAC, arXiv 2604.12384, section on weight constraints; there the gradient is projected,
which Adam's element-wise rescaling undoes, so here the update itself is. Under LoRA
``ΔW = s·B·A`` and the projection acts on A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safeft.constraints.shards import (
    MatrixShard,
    Origin,
    RankGroup,
    UpdateShard,
    right_products,
    summed,
)


def rounding_limit(eps: float, weight: float = 1.0, update: float = 1.0) -> float:
    """How large ``‖ΔW·U‖_F / ‖ΔW‖_F`` may be after a projection in floating point.

    Args:
        eps: machine epsilon of the numbers that are kept.
        weight, update: ``‖W‖_F`` and ``‖ΔW‖_F`` where W itself is kept and rounded; alike where the
            update is.
    """
    return 1e-5 + 4 * eps * weight / update


class UpdateProjection:
    """The projection of some layers' updates.

    Args:
        bases: U ``(d_in, k)`` by layer, orthonormal columns.
    """

    def __init__(self, bases: Mapping[str, Tensor]) -> None:
        self._bases = dict(bases)

    def apply(
        self,
        shards: Sequence[MatrixShard],
        origins: Mapping[str, Origin],
        group: RankGroup,
    ) -> None:
        """Project the shards of the covered layers in place. All ranks call alike.

        Args:
            origins: W0 of layers that are trained whole; a layer without one (LoRA's A) is its own
                update.
        """
        covered = [shard for shard in shards if shard.name in self._bases]
        for shard in covered:
            if not shard.split_rows:  # nobody else is needed: one layer in memory at a time
                self._apply([shard], origins, group)
        if split := [shard for shard in covered if shard.split_rows]:
            self._apply(split, origins, group)

    def _apply(
        self, shards: Sequence[MatrixShard], origins: Mapping[str, Origin], group: RankGroup
    ) -> None:
        updates = self._updates(shards, origins)
        bases = [self._basis(update) for update in updates]
        products = right_products(updates, bases, group)
        for update, U, product in zip(updates, bases, products, strict=True):
            values = update.shard.values
            if update.shard.has_whole_rows:  # one pass over the weights, in place
                values.view(-1, update.shard.cols).addmm_(product, U.mT, alpha=-1)
            else:
                values.sub_(update.shard.from_rows(product @ U.mT))

    def drift(
        self,
        shards: Sequence[MatrixShard],
        origins: Mapping[str, Origin],
        group: RankGroup,
    ) -> tuple[float, float] | None:
        """``‖ΔW·U‖_F / ‖ΔW‖_F`` over all covered layers, and its `rounding_limit`.

        None at ΔW = 0. All ranks call alike.
        """
        updates = self._updates(shards, origins)
        products = right_products(updates, [self._basis(update) for update in updates], group)
        inside = torch.zeros((), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        weight = torch.zeros((), dtype=torch.float64)
        for update, product in zip(updates, products, strict=True):
            total += update.delta.pow(2).sum().double().cpu()
            weight += update.shard.values.pow(2).sum().double().cpu()
            # A split row stands on several ranks: the one that holds its beginning counts it.
            begun = 1 if update.shard.start % update.shard.cols else 0
            inside += product[begun:].pow(2).sum().double().cpu()
        kept = shards[0].values
        sums = torch.stack([inside, total, weight]).to(kept.device)
        inside, total, weight = summed([sums], group)[0]
        if not total > 0:
            return None
        eps = torch.finfo(kept.dtype).eps
        return math.sqrt(inside / total), rounding_limit(eps, math.sqrt(weight), math.sqrt(total))

    def _updates(
        self, shards: Sequence[MatrixShard], origins: Mapping[str, Origin]
    ) -> list[UpdateShard]:
        return [
            UpdateShard(
                shard,
                origins[shard.name].update_of(shard)
                if shard.name in origins
                else shard.as_rows(shard.values),
            )
            for shard in shards
            if shard.name in self._bases
        ]

    def _basis(self, update: UpdateShard) -> Tensor:
        name, device = update.shard.name, update.delta.device
        if self._bases[name].device != device:  # follow the model, once
            self._bases[name] = self._bases[name].to(device)
        return self._bases[name]


def project_rows(rows: Tensor, U: Tensor) -> Tensor:
    """``X·(I − U·Uᵀ)`` of rows X ``(m, d_in)``, in U's dtype; X's dtype is kept."""
    wide = rows.to(U.dtype)
    return torch.addmm(wide, wide @ U, U.mT, alpha=-1).to(rows.dtype)

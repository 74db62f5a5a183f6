"""AsFT: anchor the update to the alignment direction.

Source: arXiv 2506.08473 (AAAI 2026). The task loss gets ``λ · Σ_layers ‖(I − C)·ΔW‖_F²``, where C
is made of the layer's alignment direction V. In factors, with ``C = U·diag(c)·Uᵀ`` and ΔW = B·A:

    X = B − U·(c ∘ (Uᵀ·B)),   ‖(I − C)·B·A‖_F² = sum((XᵀX) ∘ (A·Aᵀ))

so nothing larger than the factors and U is ever formed. Weights that are trained whole have their
penalty from `safeft.constraints.anchored`.

C is blind to the sign: movement along V and movement back cost the same, or nothing. Our ``signed``
anchor charges the latter. With the singular pairs ``u_j, w_j`` of V it adds

    λ · Σ_layers Σ_j min(0, u_jᵀ·ΔW·w_j)²
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from safeft.constraints.alignment import (
    REBUILD,
    SIGNED,
    AlignmentDirection,
    layer_direction,
    load_directions,
)
from safeft.constraints.base import (
    Anchor,
    Constraint,
    FactorStack,
    ProfileFiles,
    groups_of_one_shape,
)
from safeft.constraints.l2 import check_strength, covered, squared_norms, update_norm
from safeft.errors import ModelError, ProfileError
from safeft.lora import LoraPair
from safeft.weights import FullWeight, Layers, TrainedLayers, chosen_layers


@dataclass(frozen=True)
class AsftConfig:
    """AsFT with the paper's settings as defaults, but for λ.

    Args:
        lam: λ. The paper's is 1, on q_proj and v_proj alone; on all linear layers beside CWAC's
            projection hardly anything is learned then (docs/evidence.md).
        anchor: ``paper``: ``C = V·Vᵀ / ‖V‖_F`` as in the official code, which is no projector;
            ``projector``: ``C = U_k·U_kᵀ``; ``signed``: the projector, and what moves back along V
            costs too (LoRA only).
        energy: share of ``‖V‖_F²`` that the k columns of the projector hold.
        include_scale: ``ΔW = s·B·A``; the paper's ΔW is ``B·A``.
        layers: endings of layer names, or every trained linear layer of the decoder.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    parts: ClassVar[tuple[str, ...]] = ("alignment",)

    kind: Literal["asft"] = "asft"
    lam: float = 0.1
    anchor: Literal["paper", "projector", "signed"] = "paper"
    energy: float = 0.99
    include_scale: bool = False
    layers: Layers = "all-linear"

    def __post_init__(self) -> None:
        check_strength(self.lam)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, not {self.energy}")

    def build(self, profile: ProfileFiles) -> Asft:
        """The constraint.

        Raises:
            ProfileError: the profile has no alignment direction.
        """
        return Asft(self, load_directions(profile.part("alignment", self.kind)))


class Asft(Constraint):
    """The penalty in its factored form, batched over modules of one shape."""

    name = "asft"

    def __init__(self, config: AsftConfig, directions: Mapping[str, AlignmentDirection]) -> None:
        self._config = config
        self._directions = directions
        self._stacked: list[tuple[Tensor, Tensor]] = []  # (U, c) of each stack
        self._right: list[Tensor] = []  # (L, k, d_in) of each stack, where the anchor is signed
        self._whole: dict[str, Anchor] = {}
        self._names: set[str] = set()

    def bind(self, layers: TrainedLayers) -> None:
        self._names = set(chosen_layers(layers, self._config.layers, self.name))
        pairs = {name: layer for name, layer in layers.items() if isinstance(layer, LoraPair)}
        groups = groups_of_one_shape(pairs)
        self._stacked = [self._stack(group) for group in groups]
        if self._config.anchor == "signed":
            if whole := [n for n in self._names if n not in pairs]:
                raise ModelError(
                    f"constraint {self.name}: {whole[0]} is trained whole; anchor: signed is for "
                    "LoRA, choose paper or projector"
                )
            self._right = [self._stack_right(group) for group in groups]
        self._whole = {
            name: Anchor(self._config.lam, *self._anchor(layer))
            for name, layer in layers.items()
            if isinstance(layer, FullWeight) and name in self._names
        }

    def anchors(self) -> Mapping[str, Anchor]:
        return self._whole

    def penalty(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        return [
            self._config.lam
            * covered(stack, self._names)
            * norms
            * (stack.scale**2 if self._config.include_scale else 1.0)
            for stack, norms in zip(stacks, self._charged(stacks), strict=True)
        ]

    def metrics(self, stacks: Sequence[FactorStack]) -> dict[str, float]:
        """``update_norm`` and ``orthogonal_fraction``: ``‖(I − C)·ΔW‖_F / ‖ΔW‖_F``, both over all
        modules and with LoRA's scale; ``back_fraction`` likewise, of what moves back along V, where
        the anchor is signed. At ΔW = 0 the fractions are left out."""
        norm = update_norm(stacks)
        if norm == 0:
            return {"update_norm": norm}
        parts = {"orthogonal_fraction": self._orthogonal(stacks)}
        if self._config.anchor == "signed":
            parts["back_fraction"] = self._back(stacks)
        found = {"update_norm": norm}
        for key, squares in parts.items():
            total = sum(
                float(stack.scale**2 * each.double().sum())
                for stack, each in zip(stacks, squares, strict=True)
            )
            found[key] = math.sqrt(max(total, 0.0)) / norm
        return found

    def _orthogonal(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        """``‖(I − C)·B·A‖_F²`` of each module: one ``(L,)`` vector a stack."""
        if stacks and stacks[0].B.device != self._stacked[0][0].device:
            device = stacks[0].B.device  # the model moved after bind: follow it, once
            self._stacked = [(U.to(device), c.to(device)) for U, c in self._stacked]
        norms = []
        for stack, (U, c) in zip(stacks, self._stacked, strict=True):
            X = stack.B - U @ (c[:, :, None] * (U.mT @ stack.B))
            norms.append(squared_norms(X, stack.A))
        return norms

    def _charged(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        """What the penalty counts of each module: one ``(L,)`` vector a stack."""
        held = self._orthogonal(stacks)
        if self._config.anchor == "signed":
            held = [h + b for h, b in zip(held, self._back(stacks), strict=True)]
        return held

    def _back(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        """``Σ_j min(0, u_jᵀ·B·A·w_j)²`` of each module: one ``(L,)`` vector a stack."""
        if stacks and stacks[0].B.device != self._right[0].device:
            self._right = [right.to(stacks[0].B.device) for right in self._right]
        return [
            ((U.mT @ stack.B) * (right @ stack.A.mT)).sum(-1).clamp(max=0.0).pow(2).sum(-1)
            for stack, (U, _), right in zip(stacks, self._stacked, self._right, strict=True)
        ]

    def _stack_right(self, group: Sequence[LoraPair]) -> Tensor:
        """The right singular vectors beside U's columns: ``(L, k, d_in)``, padded with zeros."""
        chosen = [self._paired(pair) if pair.name in self._names else None for pair in group]
        k = max(0 if right is None else len(right) for right in chosen)
        stacked = torch.zeros(len(group), k, group[0].d_in)
        for index, right in enumerate(chosen):
            if right is not None:
                stacked[index, : len(right)] = right
        return stacked

    def _paired(self, pair: LoraPair) -> Tensor:
        """The right singular vectors of one module, ``(k, d_in)``."""
        right = layer_direction(pair, self._directions, self.name).right
        if right is None or right.shape[1] != pair.d_in:
            raise ProfileError(
                f"constraint {self.name}: the profile holds no right singular vectors of "
                f"{pair.name}, which anchor: signed needs; {REBUILD}"
            )
        return right[: self._anchor(pair)[1].numel()]

    def _stack(self, group: Sequence[LoraPair]) -> tuple[Tensor, Tensor]:
        """U ``(L, d_out, k)`` and C's eigenvalues ``(L, k)``, padded with zeros to one k."""
        anchors = [
            self._anchor(pair)
            if pair.name in self._names
            else (torch.zeros(pair.d_out, 0), torch.zeros(0))
            for pair in group
        ]
        k = max(c.numel() for _, c in anchors)
        U = torch.zeros(len(group), group[0].d_out, k)
        eigenvalues = torch.zeros(len(group), k)
        for index, (columns, c) in enumerate(anchors):
            U[index, :, : c.numel()] = columns
            eigenvalues[index, : c.numel()] = c
        return U, eigenvalues

    def _anchor(self, pair: LoraPair | FullWeight) -> tuple[Tensor, Tensor]:
        """U and the eigenvalues of C of one module. Where V is 0, C is 0: plain ``‖ΔW‖²``."""
        direction = layer_direction(pair, self._directions, self.name)
        if self._config.anchor == "paper":
            c = direction.eigenvalues()
            # Below half of fp32's resolution beside the identity a direction changes nothing.
            seen = int((c > torch.finfo(torch.float32).eps / 2).sum())
            return direction.U[:, :seen], c[:seen].float()
        squares = direction.singular_values.double().pow(2)
        held = squares.cumsum(0) / squares.sum()
        k = min(int((held < self._config.energy).sum()) + 1, squares.numel())
        if self._config.anchor == "signed":
            k = min(k, SIGNED)
        return direction.U[:, :k], torch.ones(k)

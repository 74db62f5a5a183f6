"""The control arm: hold the whole update small, in no particular direction."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from safeft.constraints.base import Anchor, Constraint, FactorStack, ProfileFiles
from safeft.weights import FullWeight, Layers, TrainedLayers, chosen_layers


def check_strength(lam: float) -> None:
    """ValueError unless the strength of a penalty is a finite number of at least 0."""
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be a finite number of at least 0, not {lam}")


def squared_norms(B: Tensor, A: Tensor) -> Tensor:
    """``‖B·A‖_F²`` of each module without forming a product of size d_out × d_in.

    Args:
        B: ``(L, d_out, r)``.
        A: ``(L, r, d_in)``.

    Returns:
        ``(L,)``, as ``sum((BᵀB) ∘ (A·Aᵀ))``.
    """
    return ((B.mT @ B) * (A @ A.mT)).sum(dim=(1, 2))


@dataclass(frozen=True)
class L2Config:
    """``lam · ‖ΔW‖_F²``, the arm that a directional penalty has to beat.

    Args:
        lam: strength λ.
        include_scale: ``ΔW = s·B·A`` rather than ``B·A``, as for AsFT.
        layers: endings of layer names, or every trained linear layer of the decoder.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    parts: ClassVar[tuple[str, ...]] = ()

    kind: Literal["l2"] = "l2"
    lam: float = 1.0
    include_scale: bool = False
    layers: Layers = "all-linear"

    def __post_init__(self) -> None:
        check_strength(self.lam)

    def build(self, profile: ProfileFiles) -> L2:
        """The constraint; it needs nothing of the profile."""
        return L2(self)


class L2(Constraint):
    """``C = 0`` in AsFT's penalty."""

    name = "l2"

    def __init__(self, config: L2Config) -> None:
        self._config = config
        self._covered: dict[str, FullWeight] = {}
        self._names: set[str] = set()

    def bind(self, layers: TrainedLayers) -> None:
        """No profile is needed."""
        self._names = set(chosen_layers(layers, self._config.layers, self.name))
        self._covered = {
            name: layer
            for name, layer in layers.items()
            if name in self._names and isinstance(layer, FullWeight)
        }

    def anchors(self) -> Mapping[str, Anchor]:
        return {
            name: Anchor(self._config.lam, torch.zeros(layer.d_out, 0), torch.zeros(0))
            for name, layer in self._covered.items()
        }

    def penalty(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        return [
            self._weight(stack) * covered(stack, self._names) * squared_norms(stack.B, stack.A)
            for stack in stacks
        ]

    def metrics(self, stacks: Sequence[FactorStack]) -> dict[str, float]:
        """``update_norm``: ``‖s·B·A‖_F`` over all modules."""
        return {"update_norm": update_norm(stacks)}

    def _weight(self, stack: FactorStack) -> float:
        return self._config.lam * (stack.scale**2 if self._config.include_scale else 1.0)


def covered(stack: FactorStack, names: Collection[str]) -> Tensor:
    """``(L,)``: 1 for the stack's modules that a constraint covers, else 0."""
    return torch.tensor([float(name in names) for name in stack.names], device=stack.A.device)


def update_norm(stacks: Sequence[FactorStack]) -> float:
    """``‖ΔW‖_F`` over all modules, LoRA's scale included."""
    total = sum(float(s.scale**2 * squared_norms(s.B, s.A).double().sum()) for s in stacks)
    return math.sqrt(max(total, 0.0))

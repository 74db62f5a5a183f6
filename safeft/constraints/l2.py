"""The control arm: hold the whole update small, in no particular direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from safeft.constraints.base import Constraint, FactorStack, ProfileFiles
from safeft.lora import LoraPair


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
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["l2"] = "l2"
    lam: float = 1.0
    include_scale: bool = False

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

    def bind(self, pairs: Mapping[str, LoraPair]) -> None:
        """Nothing to check: no profile is needed."""

    def penalty(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        return [self._weight(stack) * squared_norms(stack.B, stack.A) for stack in stacks]

    def metrics(self, stacks: Sequence[FactorStack]) -> dict[str, float]:
        """``update_norm``: ``‖s·B·A‖_F`` over all modules."""
        return {"update_norm": update_norm(stacks)}

    def _weight(self, stack: FactorStack) -> float:
        return self._config.lam * (stack.scale**2 if self._config.include_scale else 1.0)


def update_norm(stacks: Sequence[FactorStack]) -> float:
    """``‖ΔW‖_F`` over all modules, LoRA's scale included."""
    total = sum(float(s.scale**2 * squared_norms(s.B, s.A).double().sum()) for s in stacks)
    return math.sqrt(max(total, 0.0))

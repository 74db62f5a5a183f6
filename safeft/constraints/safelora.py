"""A baseline: SafeLoRA, a projection of the finished adapter onto the alignment direction.

Source: arXiv 2405.16833. With ``C = V·Vᵀ / ‖V‖_F``: where ``cos(C·ΔW, ΔW)`` is at most the
threshold, ``B ← C·B``. Training itself is plain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from safeft.constraints.alignment import AlignmentDirection, layer_direction, load_directions
from safeft.constraints.base import Constraint, ProfileFiles
from safeft.errors import ModelError
from safeft.lora import LoraPair
from safeft.weights import TrainedLayers

if TYPE_CHECKING:
    from safeft.adapters import LoraFactors


@dataclass(frozen=True)
class SafeLoraConfig:
    """SafeLoRA by threshold.

    Args:
        threshold: layers whose update has at most this cosine with its projection are projected.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    parts: ClassVar[tuple[str, ...]] = ("alignment",)

    kind: Literal["safelora"] = "safelora"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [-1, 1], not {self.threshold}")

    def build(self, profile: ProfileFiles) -> SafeLora:
        """The constraint.

        Raises:
            ProfileError: the profile has no alignment direction.
        """
        return SafeLora(self, load_directions(profile.part("alignment", self.kind)))


class SafeLora(Constraint):
    """Acts once, when training is over."""

    name = "safelora"

    def __init__(
        self, config: SafeLoraConfig, directions: Mapping[str, AlignmentDirection]
    ) -> None:
        self._config = config
        self._directions = directions

    def bind(self, layers: TrainedLayers) -> None:
        for layer in layers.values():
            if not isinstance(layer, LoraPair):
                raise ModelError("constraint safelora: works on LoRA adapters only; set lora")
            layer_direction(layer, self._directions, self.name)

    def finish_adapter(self, factors: LoraFactors) -> LoraFactors:
        projected = {n: (A, self._projected(n, A, B)) for n, (A, B) in factors.factors.items()}
        return dataclasses.replace(factors, factors=projected)

    def _projected(self, name: str, A: Tensor, B: Tensor) -> Tensor:
        """C·B where the layer's update strays from C, else B: ``(d_out, r)`` fp32."""
        direction = self._directions[name]
        c = direction.eigenvalues()
        if c.numel() == 0:
            return B  # alignment left the layer alone: there is nothing to project onto
        U, A64, B64 = direction.U.double(), A.double(), B.double()
        X = U @ (c[:, None] * (U.mT @ B64))  # C·B
        AA = A64 @ A64.mT  # (r, r)

        def inner(P: Tensor, Q: Tensor) -> Tensor:
            return ((P.mT @ Q) * AA).sum()  # <P·A, Q·A>

        norms = (inner(X, X) * inner(B64, B64)).clamp_min(0).sqrt()
        if norms == 0 or inner(X, B64) / norms > self._config.threshold:
            return B
        return X.to(B.dtype)

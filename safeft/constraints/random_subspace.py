"""The control of CWAC's weight side: updates kept out of random subspaces of equal rank.

A projection protects by leaving fewer directions to train, whichever they are. What CWAC's own
directions add is what it keeps above this arm.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from safeft.constraints.base import ProfileFiles
from safeft.constraints.cwac import Cwac, CwacConfig
from safeft.weights import Layers

if TYPE_CHECKING:
    from safeft.constraints.subspaces import Positions, SavedSubspaces


@dataclass(frozen=True)
class RandomSubspaceConfig:
    """For each layer, as many random directions as `CwacConfig` with these fields would take.

    Args:
        layers, positions, energy, rank: as in `CwacConfig`, for its `mode: weight_only`.
        seed: of the directions.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    parts: ClassVar[tuple[str, ...]] = ("harmful-inputs",)

    kind: Literal["random-subspace"] = "random-subspace"
    layers: Layers = "all-linear"
    positions: Literal["prompt", "response", "both"] = "both"
    energy: float = 0.99
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.counterpart()

    def counterpart(self) -> CwacConfig:
        """The projection whose ranks these are.

        Raises:
            ValueError: energy or rank is out of range.
        """
        return CwacConfig(
            mode="weight_only",
            layers=self.layers,
            positions=self.positions,
            energy=self.energy,
            rank=self.rank,
            contrast=None,
        )

    def build(self, profile: ProfileFiles) -> RandomSubspace:
        """The constraint.

        Raises:
            ProfileError: the profile has no harmful inputs, whose ranks are needed.
        """
        # Here, as reading a spec need not wait for safetensors.
        from safeft.constraints.subspaces import load_subspaces

        return RandomSubspace(self, load_subspaces(profile.part("harmful-inputs", self.kind)))


class RandomSubspace(Cwac):
    """CWAC's projection, with other directions."""

    name = "random-subspace"

    def __init__(self, config: RandomSubspaceConfig, subspaces: SavedSubspaces) -> None:
        super().__init__(config.counterpart(), _OfEqualRank(subspaces, config.seed), None)


class _OfEqualRank:
    """Stands for the profile's subspaces."""

    def __init__(self, subspaces: SavedSubspaces, seed: int) -> None:
        self._subspaces, self._seed = subspaces, seed

    def basis(
        self, module_name: str, positions: Positions, energy: float, rank: int | None
    ) -> Tensor:
        """U ``(d_in, k)`` fp32, orthonormal columns: a uniformly random subspace."""
        shape = self._subspaces.basis(module_name, positions, energy, rank).shape
        # Of the name, not of the order, so that every rank and every resumed run draws alike.
        digest = hashlib.sha256(f"{self._seed} {module_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        drawn = torch.randn(*shape, dtype=torch.float64, generator=generator)
        orthonormal: Tensor = torch.linalg.qr(drawn).Q
        return orthonormal.float()

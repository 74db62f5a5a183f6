"""AsFT's penalty with its backward pass: the official dense form against the factored one.

The dense form is written from the paper's formula as the authors' code evaluates it: C materialised
d_out × d_out, and a d_out × d_in product in every layer and step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from safeft.constraints.alignment import AlignmentDirection
from safeft.constraints.asft import Asft, AsftConfig
from safeft.constraints.factors import FactorPenalties
from safeft.lora import LoraPair


def random_pairs(shapes: Mapping[str, tuple[int, int]], rank: int = 8) -> dict[str, LoraPair]:
    """LoRA factors away from zero for layers of shape (d_out, d_in)."""
    torch.manual_seed(0)
    return {
        name: LoraPair(
            name,
            nn.Parameter(torch.randn(rank, d_in) / d_in**0.5),
            nn.Parameter(torch.randn(d_out, rank) * 0.01),
            4.0,
            rank,
            d_in,
            d_out,
        )
        for name, (d_out, d_in) in shapes.items()
    }


class DenseAsft:
    """Penalty and gradient of every layer, by autograd through the dense form."""

    def __init__(
        self, pairs: Mapping[str, LoraPair], directions: Mapping[str, AlignmentDirection]
    ) -> None:
        self._layers = [(pair, self._c(directions[name])) for name, pair in pairs.items()]

    def __call__(self) -> Tensor:
        total = torch.zeros(())
        for pair, C in self._layers:
            update = pair.B @ pair.A
            total = total + (update - C @ update).pow(2).sum()
        leaves = [factor for pair, _ in self._layers for factor in (pair.A, pair.B)]
        torch.autograd.grad(total, leaves)
        return total.detach()

    @staticmethod
    def _c(direction: AlignmentDirection) -> Tensor:
        return (direction.U * direction.eigenvalues().float()) @ direction.U.mT


class FactoredAsft:
    """The same by safeft."""

    def __init__(
        self, pairs: Mapping[str, LoraPair], directions: Mapping[str, AlignmentDirection]
    ) -> None:
        constraint = Asft(AsftConfig(lam=1.0), directions)
        constraint.bind(pairs)
        self._penalties = FactorPenalties([constraint], pairs)

    def __call__(self) -> float:
        values, _ = self._penalties.compute(1.0)
        return values["asft"]


def random_direction(d_out: int, k: int) -> AlignmentDirection:
    """Of a V of rank k, as a merged LoRA leaves it."""
    torch.manual_seed(1)
    U, _ = torch.linalg.qr(torch.randn(d_out, k))
    return AlignmentDirection(U, torch.linspace(1.0, 0.1, k))

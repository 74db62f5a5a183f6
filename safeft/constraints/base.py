"""What a safety constraint on a fine-tuning run is, and the view of LoRA factors it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from safeft.errors import TrainingError
from safeft.lora import LoraPair


@dataclass(frozen=True)
class ProfileFiles:
    """Where the parts of the base model's safety profile lie that constraints read.

    None: the run was given no such part. A constraint that needs it then fails closed.
    """

    alignment: Path | None = None


@dataclass(frozen=True)
class FactorStack:
    """The factors of all LoRA layers of one shape, for batched products.

    Attributes:
        names: the L modules' names, in the order of the first dimension.
        A: ``(L, r, d_in)``, fp32, a copy of the parameters that carries its own gradient.
        B: ``(L, d_out, r)``, fp32, likewise.
        scale: LoRA's ``s`` of these modules.
    """

    names: tuple[str, ...]
    A: Tensor
    B: Tensor
    scale: float


class Constraint(ABC):
    """One constraint. The trainer calls these four and does not know which one it holds."""

    name: ClassVar[str]

    @abstractmethod
    def bind(self, pairs: Mapping[str, LoraPair]) -> None:
        """Called once, before the first step: check and take what these modules need.

        Raises:
            ProfileError: the profile lacks something; the module is named. Fails closed.
        """

    def penalty(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        """The term this constraint adds to the task loss, differentiable in the stacks' A and B.

        Returns:
            One ``(L,)`` vector for each stack (in order): the contribution of each module, so that
            a value that is not finite can be traced to its module. The penalty is their sum.
            Empty: this constraint has no penalty.
        """
        return []

    def after_step(self) -> None:  # noqa: B027  (most constraints need none)
        """Called after each optimizer step; a constraint on the weights themselves acts here."""

    def metrics(self, stacks: Sequence[FactorStack]) -> dict[str, float]:
        """What the constraint says about the current update. A number that is 0/0 is left out."""
        return {}


def groups_of_one_shape(pairs: Mapping[str, LoraPair]) -> list[tuple[LoraPair, ...]]:
    """The pairs grouped by shape and scale, always in the same order: what becomes one stack each.

    A constraint that stacks constants of its own for each module uses this same grouping.
    """
    groups: dict[tuple[int, int, int, float], list[LoraPair]] = {}
    for pair in pairs.values():
        key = (pair.d_out, pair.d_in, pair.rank, pair.scale)
        groups.setdefault(key, []).append(pair)
    return [tuple(group) for group in groups.values()]


def stack_factors(groups: Sequence[Sequence[LoraPair]]) -> list[FactorStack]:
    """Copies of the current factors, one stack a group. The parameters' graph is left alone.

    Raises:
        TrainingError: a factor is sharded (ZeRO-3 released it); its module is named.
    """
    for group in groups:
        for pair in group:
            whole = ((pair.rank, pair.d_in), (pair.d_out, pair.rank))
            if (tuple(pair.A.shape), tuple(pair.B.shape)) != whole:
                raise TrainingError(
                    f"{pair.name}: the LoRA factors are sharded ({tuple(pair.A.shape)}, "
                    f"{tuple(pair.B.shape)} instead of {whole[0]}, {whole[1]}); gather them before "
                    "the penalty is computed"
                )
    return [
        FactorStack(
            names=tuple(pair.name for pair in group),
            A=torch.stack([pair.A.detach().float() for pair in group]).requires_grad_(),
            B=torch.stack([pair.B.detach().float() for pair in group]).requires_grad_(),
            scale=group[0].scale,
        )
        for group in groups
    ]

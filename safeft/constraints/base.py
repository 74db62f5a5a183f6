"""What a safety constraint on a fine-tuning run is, and the view of LoRA factors it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from safeft.errors import ProfileError, TrainingError
from safeft.lora import LoraPair
from safeft.weights import TrainedLayers

if TYPE_CHECKING:
    from safeft.adapters import LoraFactors  # imports peft: seconds


@dataclass(frozen=True)
class ProfileFiles:
    """Where the parts of the base model's safety profile lie that constraints read.

    None: the run was given no such part. A constraint that needs it then fails closed.

    Attributes:
        alignment: the directory with the alignment directions.
        harmful_inputs: the directory with the harmful-input subspaces.
        autoencoder: the directory with the autoencoder, its latents and their baselines.
        benign_inputs: the directory with what benign inputs share with the subspaces.
        held_states: the directory with the base model's states where it refuses and answers.
        reactivation: the directory with a restoration's targets; not a part of a profile.
    """

    alignment: Path | None = None
    harmful_inputs: Path | None = None
    autoencoder: Path | None = None
    benign_inputs: Path | None = None
    held_states: Path | None = None
    reactivation: Path | None = None

    def part(self, name: str, constraint: str) -> Path:
        """The path of a part, by the part's name in the profile.

        Raises:
            ProfileError: the run was given none.
        """
        path: Path | None = getattr(self, name.replace("-", "_"))
        if path is None:
            raise ProfileError(
                f"constraint {constraint} needs the part {name!r} of the base model's safety "
                f"profile; make it with `safeft profile build --part {name}`"
            )
        return path


@dataclass(frozen=True)
class FactorStack:
    """The factors of all LoRA layers of one shape, for batched products.

    Attributes:
        names: the L modules' names, in the order of the first dimension.
        A: ``(L, r, d_in)``, fp32, a copy of the parameters that carries its own gradient.
        B: ``(L, d_out, r)``, fp32, likewise.
        scale: LoRA's ``s`` of these modules.
        eps: machine epsilon of the parameters that were copied.
    """

    names: tuple[str, ...]
    A: Tensor
    B: Tensor
    scale: float
    eps: float


@dataclass(frozen=True)
class Anchor:
    """A quadratic penalty on a layer that is trained whole: ``λ · ‖(I − U·diag(c)·Uᵀ)·ΔW‖_F²``.

    Attributes:
        lam: λ.
        U: ``(d_out, k)``, orthonormal columns; k = 0: plain ``λ‖ΔW‖²``.
        c: ``(k,)``.
    """

    lam: float
    U: Tensor
    c: Tensor


@dataclass(frozen=True)
class ForwardTerm:
    """A term of the loss from a forward pass of its own.

    Attributes:
        loss: a scalar; what counts is its mean over the ranks.
        penalty: that mean.
        metrics: more to say about it.
    """

    loss: Tensor
    penalty: float
    metrics: Mapping[str, float]


class Constraint(ABC):
    """One constraint. The trainer calls these and does not know which one it holds."""

    name: ClassVar[str]

    @abstractmethod
    def bind(self, layers: TrainedLayers) -> None:
        """Called once, before the first step: check and take what these layers need.

        Raises:
            ProfileError: the profile lacks something; the layer is named. Fails closed.
            ModelError: the constraint covers none of the layers.
        """

    def penalty(self, stacks: Sequence[FactorStack]) -> list[Tensor]:
        """Under LoRA: what is added to the task loss, differentiable in the stacks' A and B.

        Returns:
            One ``(L,)`` vector for each stack (in order): the contribution of each module, so that
            a value that is not finite can be traced to its module. The penalty is their sum.
            Empty: this constraint has no penalty.
        """
        return []

    def anchors(self) -> Mapping[str, Anchor]:
        """Under full-parameter training: the penalty on each covered layer, by its name."""
        return {}

    def update_bases(self) -> Mapping[str, Tensor]:
        """U ``(d_in, k)`` by layer, orthonormal columns: after each step ``ΔW ← ΔW·(I − U·Uᵀ)``."""
        return {}

    def gradient_bases(self) -> Mapping[str, Tensor]:
        """U ``(d_in, k)`` by layer: each gradient ``G ← G·(I − U·Uᵀ)`` before the optimizer."""
        return {}

    def frozen(self) -> Collection[str]:
        """Layers that are not trained at all."""
        return ()

    def forward_loss(self, model: nn.Module, step: int) -> ForwardTerm | None:
        """A term of the loss that needs a forward pass of its own; None: there is none.

        Args:
            model: the causal language model, in training.
            step: the 0-based optimizer step, from which all ranks draw the same batch.
        """
        return None

    def retained_layers(self) -> Sequence[int]:
        """Decoder layers at which the run's rows are held where the model without its adapter has
        them, instead of being learned; empty: they are learned."""
        return ()

    def row_weight(self, step: int) -> float:
        """What the rows' own loss counts in the 0-based `step`."""
        return 1.0

    def finish_adapter(self, factors: LoraFactors) -> LoraFactors:
        """A change that is made once, to the trained adapter."""
        return factors

    def metrics(self, stacks: Sequence[FactorStack]) -> dict[str, float]:
        """Under LoRA: what to say about the current update. A number that is 0/0 is left out.

        ``<name>_limit`` beside a number is the most that rounding explains of it: above that, the
        constraint did not hold.
        """
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
            eps=torch.finfo(group[0].A.dtype).eps,
        )
        for group in groups
    ]

"""Hold the states of several layers where the base model refuses harmful prompts, and answers
borderline ones.

CWAC's activation side (arXiv 2604.12384) without an autoencoder: there, latents of one layer at the
last positions of the prompt are held, which leaves later layers and the refusal itself free; here
the residual stream h at several depths, at the template after the prompt and the model's answer:

    λ · mean ‖h − h_base‖² / ‖h_base‖²

over the compared positions of a small batch of rows in every step, and the layers. The profile
holds h_base, so that a step reads these rows once. As a share of the state's own length, λ does not
depend on the scale of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from safeft.constraints.base import Constraint, ForwardTerm, ProfileFiles
from safeft.constraints.draw import draw
from safeft.constraints.l2 import check_strength
from safeft.errors import ModelError, TrainingError
from safeft.weights import TrainedLayers

if TYPE_CHECKING:
    from safeft.reactivation_targets import Targets


@dataclass(frozen=True)
class HeldStatesConfig:
    """The penalty and its batch.

    Args:
        lam: λ.
        batch: rows in each step's penalty, over all workers: harmful and borderline prompts as
            they are mixed in the profile.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    parts: ClassVar[tuple[str, ...]] = ("held-states",)

    kind: Literal["held-states"] = "held-states"
    lam: float = 10.0
    batch: int = 4

    def __post_init__(self) -> None:
        check_strength(self.lam)
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")

    def build(self, profile: ProfileFiles) -> HeldStates:
        """The constraint.

        Raises:
            ProfileError: the profile lacks the part, or it cannot be read.
        """
        from safeft.reactivation_targets import load_targets  # imports transformers

        return HeldStates(self, load_targets(profile.part("held-states", self.kind), "held-states"))


class HeldStates(Constraint):
    """The penalty, for LoRA and for whole weights."""

    name = "held_states"

    def __init__(self, config: HeldStatesConfig, targets: Targets) -> None:
        self._config, self._targets = config, targets

    def bind(self, layers: TrainedLayers) -> None:
        if not layers:
            raise ModelError(f"constraint {self.name}: no layer is trained")

    def forward_loss(self, model: nn.Module, step: int) -> ForwardTerm:
        """The penalty of the step's rows, of which each rank reads its share.

        Raises:
            ProfileError: the model's states are not as wide as the profile's.
            TrainingError: the penalty is not finite.
        """
        from safeft.constraints.target_states import mean_over_targets

        drawn = draw(step, self._config.batch, len(self._targets.rows))
        mean, moved = mean_over_targets(model, self._targets, drawn, relative_squares, self.name)
        if not math.isfinite(moved):
            raise TrainingError(f"constraint {self.name}: the states moved by {moved}")
        lam = self._config.lam
        return ForwardTerm(lam * mean, lam * moved, {"moved": math.sqrt(moved)})


def relative_squares(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """``‖now − then‖² / ‖then‖²`` at each position, mean over layers.

    Args:
        now, then: for each layer ``(n, d)``.

    Returns:
        ``(n,)`` fp32, differentiable in `now`.
    """
    shares = [
        (h.float() - h0).pow(2).sum(-1) / h0.pow(2).sum(-1).clamp(min=torch.finfo().tiny)
        for h, h0 in zip(now, (h0.float() for h0 in then), strict=True)
    ]
    return torch.stack(shares).mean(0)

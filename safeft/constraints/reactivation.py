"""SafeReAct as a training run sees it: rows are retained, harmful prompts are brought back.

Source: arXiv 2604.00012; the loss is in `safeft.safereact`. Not a constraint that a tenant chooses:
a restoration trains with it instead of a task.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safeft.constraints.base import Constraint, ForwardTerm
from safeft.constraints.draw import draw
from safeft.data import pad_right
from safeft.errors import ModelError, ProfileError, TrainingError
from safeft.lora import LoraPair
from safeft.reactivation_targets import Targets
from safeft.safereact import SafeReactConfig, distances
from safeft.stopped_forward import residuals_after
from safeft.weights import TrainedLayers


class Reactivation(Constraint):
    """Draws the harmful prompts of each step; the trainer brings the rows that are retained."""

    name = "safereact"

    def __init__(self, config: SafeReactConfig, targets: Targets) -> None:
        self._config = config
        self._targets = targets

    def bind(self, layers: TrainedLayers) -> None:
        for name, layer in layers.items():
            if not isinstance(layer, LoraPair):
                raise ModelError(f"safereact: {name} is trained whole; a restoration is a LoRA")

    def retained_layers(self) -> tuple[int, ...]:
        return self._targets.layers

    def row_weight(self, step: int) -> float:
        return self._config.coefficients(step)[0]

    def forward_loss(self, model: nn.Module, step: int) -> ForwardTerm:
        """α·(1 − p)·mean‖h_harmful − h_ref‖₂ over the step's prompts, of which each rank reads
        its share.

        Raises:
            ProfileError: the model's states are not as wide as the reference's.
            TrainingError: the distance is not finite.
        """
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        drawn = draw(step, self._config.harmful_batch, len(self._targets.rows))
        own = drawn[rank::ranks]
        # A rank without a prompt runs one all the same: under ZeRO-3 all ranks gather together.
        far = self._far(model, own or drawn[:1])
        positions = sum(len(self._targets.states[index]) for index in drawn)
        mean = far.sum() * ((ranks if own else 0.0) / positions)
        total = mean.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
            total /= ranks
        distance = float(total)
        if not math.isfinite(distance):
            raise TrainingError(
                f"the distance to the reference is {distance}; lower restore.learning_rate"
            )
        weight = self._config.coefficients(step)[1]
        return ForwardTerm(weight * mean, weight * distance, {"distance": distance})

    def _far(self, model: nn.Module, chosen: list[int]) -> Tensor:
        """The distance at each compared position of these prompts: ``(n,)``."""
        device = next(model.parameters()).device
        rows = [self._targets.rows[index] for index in chosen]
        ids = pad_right(rows, 0)
        states = [self._targets.states[index] for index in chosen]
        now = residuals_after(model, self._targets.layers, ids.to(device))
        width, expected = now[0].shape[-1], states[0].shape[-1]
        if width != expected:
            raise ProfileError(
                f"safereact: the reference's states have {expected} numbers, the model's {width}: "
                "the profile belongs to another model"
            )
        counted = torch.zeros(ids.shape, dtype=torch.bool)
        for number, (row, found) in enumerate(zip(rows, states, strict=True)):
            counted[number, len(row) - len(found) : len(row)] = True
        # Both in the order of rows and positions.
        then = torch.cat(states).to(device).unbind(1)
        return distances([h[counted.to(device)] for h in now], then)

"""SafeReAct as a training run sees it: rows are retained, harmful prompts are brought back.

Source: arXiv 2604.00012; the loss is in `safeft.safereact`. Not a constraint that a tenant chooses:
a restoration trains with it instead of a task.
"""

from __future__ import annotations

import math

from torch import nn

from safeft.constraints.base import Constraint, ForwardTerm
from safeft.constraints.draw import draw
from safeft.constraints.target_states import mean_over_targets
from safeft.errors import ModelError, TrainingError
from safeft.lora import LoraPair
from safeft.reactivation_targets import Targets
from safeft.safereact import SafeReactConfig, distances
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
        drawn = draw(step, self._config.harmful_batch, len(self._targets.rows))
        mean, distance = mean_over_targets(model, self._targets, drawn, distances, self.name)
        if not math.isfinite(distance):
            raise TrainingError(
                f"the distance to the reference is {distance}; lower restore.learning_rate"
            )
        weight = self._config.coefficients(step)[1]
        return ForwardTerm(weight * mean, weight * distance, {"distance": distance})

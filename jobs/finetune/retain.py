"""The loss of rows that a restoration leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.finetune.loss import ForwardLoss, RowLoss, spread_weights
from safeft.data.tokenise import IGNORED
from safeft.lora import adapters_off
from safeft.safereact import distances
from safeft.stopped_forward import residuals_after


class RetainLoss(RowLoss):
    """Of a model with a LoRA adapter: how far the adapter moves its states, ``‖h − h_orig‖₂``.

    The place of `LabelLoss` where rows are retained instead of learned; no pass goes further than
    the last of the layers, and none through the output head. Counted is what has a label, less a
    row's first token: it reads nothing but itself, and as an attention sink its state is many times
    as long as all others.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], forward_loss: ForwardLoss | None = None
    ) -> None:
        """`layers`: decoder layers; `forward_loss`: a term with a forward pass of its own."""
        super().__init__(model, forward_loss)
        self._layers = tuple(layers)

    def summed(self, input_ids: Tensor, labels: Tensor, row_weights: Tensor | None) -> Tensor:
        counted = F.pad(labels[:, 1:] != IGNORED, (1, 0))
        with torch.no_grad(), adapters_off(self.model):
            before = residuals_after(self.model, self._layers, input_ids)
        now = residuals_after(self.model, self._layers, input_ids)
        moved = distances([h[counted] for h in now], [h[counted] for h in before])  # (n,)
        if row_weights is not None:
            moved = moved * spread_weights(row_weights, counted)
        return moved.sum()

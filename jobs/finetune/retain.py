"""The loss of rows that a restoration leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.finetune.loss import ForwardLoss, with_further
from safeft.data.tokenise import IGNORED
from safeft.lora import adapters_off
from safeft.safereact import distances
from safeft.stopped_forward import residuals_after


class RetainLoss(nn.Module):
    """A model with a LoRA adapter that returns how far the adapter moves its states on rows.

    The place of `LabelLoss` where rows are retained instead of learned; no pass goes further than
    the last of the layers, and none through the output head.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], forward_loss: ForwardLoss | None = None
    ) -> None:
        """`layers`: decoder layers; `forward_loss`: a term with a forward pass of its own."""
        super().__init__()
        self.model = model
        self._layers = tuple(layers)
        self._forward_loss = forward_loss

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        further: tuple[int, float] | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What backward starts from, and the sum of ``‖h − h_orig‖₂`` over the counted positions.

        Counted is what has a label, less a row's first token: it reads nothing but itself, and
        as an attention sink its state is many times as long as all others.

        Args: as of `LabelLoss`; `weight` is of the sum in the first result.
        """
        counted = F.pad(labels[:, 1:] != IGNORED, (1, 0))
        with torch.no_grad(), adapters_off(self.model):
            before = residuals_after(self.model, self._layers, input_ids)
        now = residuals_after(self.model, self._layers, input_ids)
        moved = distances([h[counted] for h in now], [h[counted] for h in before])  # (n,)
        if row_weights is not None:
            moved = moved * row_weights.float()[:, None].expand_as(counted)[counted]
        far = moved.sum()
        return with_further(far * weight, self.model, self._forward_loss, further), far.detach()

"""The losses of rows; the task's, with logits at label positions only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeft.data.tokenise import IGNORED
from safeft.label_logits import label_logits

ForwardLoss = Callable[[nn.Module, int], Tensor | None]  # of (model, step)


class RowLoss(nn.Module, ABC):
    """A model that returns the loss of rows instead of its logits, and once a step a further term
    that needs a forward pass of its own."""

    def __init__(self, model: nn.Module, forward_loss: ForwardLoss | None = None) -> None:
        """`forward_loss`: the further term."""
        super().__init__()
        self.model = model
        self._forward_loss = forward_loss

    @abstractmethod
    def summed(self, input_ids: Tensor, labels: Tensor, row_weights: Tensor | None) -> Tensor:
        """The rows' loss, summed over the positions that count, fp32. Args: as of `forward`."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        further: tuple[int, float] | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What backward starts from, and the rows' summed loss.

        No attention mask is needed: rows are padded on the right, where causal attention does not
        look, and without one attention takes its fast path.

        Args:
            input_ids: ``(batch, length)`` int64, right-padded.
            labels: the same shape, IGNORED where no loss is taken.
            weight: of the sum in the first result.
            further: the 0-based step and the weight of the further term; None: leave it out.
            row_weights: ``(batch,)``, what each row's losses count; None: 1.
        """
        rows = self.summed(input_ids, labels, row_weights)
        loss = rows * weight
        if further is not None and self._forward_loss is not None:
            step, share = further
            term = self._forward_loss(self.model, step)
            if term is not None:
                loss = loss + term * share
        return loss, rows.detach()


class LabelLoss(RowLoss):
    """Of a causal language model: the cross entropies of all label tokens."""

    def summed(self, input_ids: Tensor, labels: Tensor, row_weights: Tensor | None) -> Tensor:
        logits, targets = label_logits(self.model, input_ids, labels, use_cache=False)
        if row_weights is None:
            return F.cross_entropy(logits, targets, reduction="sum")
        counts = spread_weights(row_weights, labels[:, 1:] != IGNORED)
        return (F.cross_entropy(logits, targets, reduction="none") * counts).sum()


def spread_weights(row_weights: Tensor, counted: Tensor) -> Tensor:
    """Each row's weight at each of its positions that count, in the order of rows: ``(n,)`` fp32.

    Args:
        row_weights: ``(batch,)``.
        counted: ``(batch, length)`` bool, with n true.
    """
    return row_weights.float()[:, None].expand_as(counted)[counted]


def loss_weight(*, workers: int, accumulation_steps: int, label_tokens: float) -> float:
    """What a micro-batch's summed loss is multiplied with before ``engine.backward``.

    DeepSpeed divides by the accumulation steps and averages over ranks; afterwards the gradient is
    that of the mean over all `label_tokens` of the step, or with row weights the weighted mean.
    """
    return workers * accumulation_steps / label_tokens


def padded_filler() -> tuple[Tensor, Tensor]:
    """A batch without labels, for a worker that has no row left: its loss and gradient are 0."""
    ids = torch.zeros((1, 2), dtype=torch.int64)
    return ids, torch.full_like(ids, IGNORED)

"""The task loss, with logits at label positions only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeft.data.tokenise import IGNORED
from safeft.label_logits import label_logits

ForwardLoss = Callable[[nn.Module, int], Tensor | None]  # of (model, step)


class LabelLoss(nn.Module):
    """A causal language model that returns its loss instead of its logits."""

    def __init__(self, model: nn.Module, forward_loss: ForwardLoss | None = None) -> None:
        """`forward_loss`: a further term, which needs a forward pass of its own."""
        super().__init__()
        self.model = model
        self._forward_loss = forward_loss

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        further: tuple[int, float] | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What backward starts from, and the sum of the cross entropies of all label tokens, fp32,
        each times its row's weight where there are weights.

        No attention mask is needed: rows are padded on the right, where causal attention does not
        look, and without one attention takes its fast path.

        Args:
            input_ids: ``(batch, length)`` int64, right-padded.
            labels: the same shape, IGNORED where no loss is taken.
            weight: of the sum of cross entropies in the first result.
            row_weights: ``(batch,)``, what each row's cross entropies count.
            further: the 0-based step and the weight of the further term; None: leave it out.
        """
        logits, targets = label_logits(self.model, input_ids, labels, use_cache=False)
        if row_weights is None:
            task = F.cross_entropy(logits, targets, reduction="sum")
        else:
            wanted = labels[:, 1:] != IGNORED
            per_token = row_weights.float()[:, None].expand_as(wanted)[wanted]
            task = (F.cross_entropy(logits, targets, reduction="none") * per_token).sum()
        return with_further(task * weight, self.model, self._forward_loss, further), task.detach()


def with_further(
    loss: Tensor,
    model: nn.Module,
    forward_loss: ForwardLoss | None,
    further: tuple[int, float] | None,
) -> Tensor:
    """The loss with the term that needs a forward pass of its own, where there is one.

    Args:
        further: the 0-based step and the weight of the term; None: leave it out.
    """
    if further is None or forward_loss is None:
        return loss
    step, share = further
    term = forward_loss(model, step)
    return loss if term is None else loss + term * share


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

"""The task loss, with logits at label positions only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeft.data.tokenise import IGNORED

ForwardLoss = Callable[[nn.Module, int], Tensor | None]  # of (model, step)


class LabelLoss(nn.Module):
    """A causal language model that returns its loss instead of its logits.

    The output head of a small model with a large vocabulary costs as much as many layers, and only
    positions that predict a label need it. A hook on the head drops the others from its input, so
    whatever the model does with its logits afterwards (soft caps, scales) stays in force, and the
    head is called by the model itself, where ZeRO-3 gathers its weight.
    """

    def __init__(self, model: nn.Module, forward_loss: ForwardLoss | None = None) -> None:
        """`forward_loss`: a further term, which needs a forward pass of its own."""
        super().__init__()
        self.model = model
        self._forward_loss = forward_loss
        self._chosen: Tensor | None = None
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.register_forward_pre_hook(self._keep_chosen)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        further: tuple[int, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What backward starts from, and the sum of the cross entropies of all label tokens, fp32.

        No attention mask is needed: rows are padded on the right, where causal attention does not
        look, and without one attention takes its fast path.

        Args:
            input_ids: ``(batch, length)`` int64, right-padded.
            labels: the same shape, IGNORED where no loss is taken.
            weight: of the sum of cross entropies in the first result.
            further: the 0-based step and the weight of the further term; None: leave it out.
        """
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        self._chosen = F.pad(wanted, (0, 1))  # the last position predicts nothing
        try:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        finally:
            self._chosen = None
        count = int(wanted.sum())
        if logits.shape[:2] != (1, count):
            raise RuntimeError(f"the output head saw {tuple(logits.shape)}, not {count} positions")
        task = F.cross_entropy(logits[0].float(), targets[wanted], reduction="sum")
        loss = task * weight
        if further is not None and self._forward_loss is not None:
            step, share = further
            term = self._forward_loss(self.model, step)
            loss = loss if term is None else loss + term * share
        return loss, task.detach()

    def _keep_chosen(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._chosen is None:
            return args
        return (args[0][self._chosen][None], *args[1:])


def loss_weight(*, workers: int, accumulation_steps: int, label_tokens: int) -> float:
    """What a micro-batch's summed loss is multiplied with before ``engine.backward``.

    DeepSpeed divides by the accumulation steps and averages over ranks; afterwards the gradient is
    that of the mean over all `label_tokens` of the step.
    """
    return workers * accumulation_steps / label_tokens


def padded_filler() -> tuple[Tensor, Tensor]:
    """A batch without labels, for a worker that has no row left: its loss and gradient are 0."""
    ids = torch.zeros((1, 2), dtype=torch.int64)
    return ids, torch.full_like(ids, IGNORED)

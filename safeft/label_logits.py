"""Logits at the positions that predict a label, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from safeft.data.tokenise import IGNORED


def label_logits(
    model: Any, input_ids: Tensor, labels: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Run a causal language model with its output head on label positions only.

    The output head of a small model with a large vocabulary costs as much as many layers. A hook on
    the head drops the other positions from its input, so whatever the model does with its logits
    afterwards (soft caps, scales) stays in force, and the head is called by the model itself, where
    ZeRO-3 gathers its weight.

    Args:
        model: a transformers causal language model, plain or wrapped by peft.
        input_ids: (B, T) int64.
        labels: (B, T) int64, IGNORED where none is taken; position t predicts the label at t + 1.
        arguments: more for the model's forward pass.

    Returns:
        For the n labels after the first column, row by row: logits (n, vocab) fp32, differentiable,
        and the labels themselves (n,).
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    chosen = F.pad(wanted, (0, 1))  # the last position predicts nothing

    def keep_chosen(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][chosen][None], *args[1:])

    head = model.get_output_embeddings()
    # Before other hooks, such as DeepSpeed's, which then see what the head sees.
    hook = head.register_forward_pre_hook(keep_chosen, prepend=True)
    try:
        logits = model(input_ids=input_ids, **arguments).logits
    finally:
        hook.remove()
    count = int(wanted.sum())
    if logits.shape[:2] != (1, count):
        raise RuntimeError(f"the output head saw {tuple(logits.shape)}, not {count} positions")
    return logits[0].float(), targets[wanted]

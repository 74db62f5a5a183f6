"""The gradient of the response loss at the decoder's output, with few logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from safeft.adapters import require_plain_head
from safeft.data.tokenise import IGNORED
from safeft.errors import ModelError

#: Logits formed at a time. On a CPU they stay in its caches; a GPU wants larger products.
CPU_LOGITS, GPU_LOGITS = 2**22, 2**27


class LabelHead:
    """Decoder and output head of a causal language model, for losses on labels alone.

    The head is linear, so the gradient of a cross entropy is (softmax - onehot) @ W: logits of the
    whole batch, which outweigh all activations of a small model, are never held.

    Raises:
        ModelError: the head is no linear layer on the decoder's output, or the model changes its
            logits afterwards (a soft cap, a scale): every gradient would be silently wrong.
    """

    def __init__(self, model: Any) -> None:
        require_plain_head(model)
        head = model.get_output_embeddings()
        self._decoder = model.get_decoder()
        if not isinstance(head, nn.Linear):
            raise ModelError(
                f"{type(model).__name__}: its output head is {type(head).__name__}, not a linear "
                "layer; choose a causal language model"
            )
        self._head = head
        ids = torch.arange(4, device=head.weight.device)[None]
        with torch.no_grad():
            ours = head(self.hidden(ids))
            theirs = model(input_ids=ids, use_cache=False).logits
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ModelError(
                f"{type(model).__name__} changes its logits after the output head (a soft cap or a "
                "scale); such models are not supported here yet"
            )

    def hidden(self, ids: Tensor) -> Tensor:
        """The decoder's output for right-padded ``ids`` (B, T): (B, T, D)."""
        return self._decoder(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    @torch.no_grad()
    def gradient(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """d(sum over rows of the row's mean cross entropy) / d hidden: (B, T, D).

        Args:
            hidden: (B, T, D); labels: (B, T), IGNORED where no loss is taken. Position t predicts
                label t + 1. Every row has a label.
        """
        targets = labels[:, 1:]
        wanted = targets != IGNORED  # (B, T-1)
        weights = (1.0 / wanted.sum(1)).unsqueeze(1).expand_as(wanted)[wanted]  # (n,)
        chosen, classes = hidden[:, :-1][wanted], targets[wanted]  # (n, D), (n,)
        weight = self._head.weight
        at_once = CPU_LOGITS if hidden.device.type == "cpu" else GPU_LOGITS
        step = max(1, at_once // weight.shape[0])
        exact = torch.promote_types(hidden.dtype, torch.float32)
        parts = []
        for start in range(0, len(classes), step):
            part = slice(start, start + step)
            p = self._head(chosen[part]).to(exact)  # (step, vocab)
            p.sub_(p.amax(-1, keepdim=True)).exp_()
            label = (torch.arange(len(p), device=p.device), classes[part])
            sure = p[label]
            p[label] = 0
            others = p.sum(-1)
            # p_label - 1 as minus all others: where the model is sure, that difference is nearly
            # all rounding, and it would be the same way round in every row.
            p[label] = -others
            p *= (weights[part] / (others + sure))[:, None]
            parts.append(p.to(weight.dtype) @ weight)
        gradient = torch.zeros_like(hidden)
        gradient[:, :-1][wanted] = torch.cat(parts)
        return gradient

"""Which weights matter for what: Wanda scores, and the difference of two sets of them.

Source: Wanda, arXiv 2306.11695: a weight's importance is ``S_ij = |W_ij|·‖X_j‖₂``, compared within
a row of W. SafeReAct (arXiv 2604.00012) zeroes what is important for a domain and not for safety.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safeft.data import pad_right
from safeft.errors import ProfileError
from safeft.weights import decoder_linears

FILE = "mask.safetensors"
REBUILD = "run `safeft profile build --model MODEL --part reference-mask`"


class InputNorms:
    """``‖X_j‖₂`` of every linear layer's inputs in the decoder, streamed over rows.

    Sums of squares are fp64, so the order and the cut into batches change nothing that matters.

    Args:
        model: a causal language model of transformers, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._linears = decoder_linears(model)
        self._squares = {
            name: torch.zeros(linear.in_features, dtype=torch.float64)
            for name, linear in self._linears.items()
        }

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Add one batch of rows of token ids; padding counts nothing."""
        device = self._model.device
        real = pad_right([[1] * len(row) for row in rows], 0).bool().to(device)  # (B, T)

        def add(name: str) -> Any:
            def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                X = args[0][real].double()  # (n, d_in)
                self._squares[name] += X.pow(2).sum(0).cpu()

            return see

        hooks = [m.register_forward_pre_hook(add(name)) for name, m in self._linears.items()]
        try:
            # Padded on the right, where causal attention does not look: no mask is needed.
            self._model.get_decoder()(input_ids=pad_right(rows, 0).to(device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def norms(self) -> dict[str, Tensor]:
        """For each layer ``(d_in,)`` fp64.

        Raises:
            ProfileError: an input was not finite, or nothing was read; the layer is named.
        """
        for name, squares in self._squares.items():
            if not torch.isfinite(squares).all():
                raise ProfileError(f"{name} reads a NaN or an infinity; check the model's weights")
            if not squares.any():
                raise ProfileError(f"{name} has read nothing, so its weights have no importance")
        return {name: squares.sqrt() for name, squares in self._squares.items()}


def difference_mask(
    W: Tensor, domain: Tensor, safety: Tensor, domain_share: float, safety_share: float
) -> Tensor:
    """What to zero: the most important weights for the domain, less those for safety.

    Args:
        W: ``(d_out, d_in)``.
        domain, safety: ``(d_in,)``, norms of the layer's inputs on either kind of data.
        domain_share, safety_share: the share of each row of W that counts as important.

    Returns:
        ``(d_out, d_in)`` bool.
    """
    chosen = _most_important(W, domain, domain_share)
    return chosen & ~_most_important(W, safety, safety_share)


def reference_mask(
    model: Any,
    domain: Mapping[str, Tensor],
    safety: Mapping[str, Tensor],
    domain_share: float,
    safety_share: float,
) -> dict[str, Tensor]:
    """`difference_mask` of every linear layer of the decoder, from `InputNorms`."""
    return {
        name: difference_mask(
            linear.weight.detach(), domain[name], safety[name], domain_share, safety_share
        )
        for name, linear in decoder_linears(model).items()
    }


@torch.no_grad()
def prune(model: Any, mask: Mapping[str, Tensor]) -> Any:
    """Zero the masked weights of a model, in place; returns it.

    Raises:
        ProfileError: the mask is not of this model's linear layers.
    """
    linears = decoder_linears(model)
    if odd := sorted(mask.keys() ^ linears.keys()):
        raise ProfileError(f"the pruning mask does not fit the model at {odd[0]}; {REBUILD}")
    for name, linear in linears.items():
        if mask[name].shape != linear.weight.shape:
            raise ProfileError(f"the pruning mask of {name} has another shape; {REBUILD}")
        linear.weight.masked_fill_(mask[name].to(linear.weight.device), 0.0)
    return model


def pruned_share(mask: Mapping[str, Tensor]) -> float:
    """Masked weights of all."""
    return sum(int(m.sum()) for m in mask.values()) / sum(m.numel() for m in mask.values())


def save_mask(mask: Mapping[str, Tensor], directory: Any) -> None:
    """One bit a weight, rows padded to whole bytes."""
    packed = {
        name: torch.from_numpy(np.packbits(m.cpu().numpy(), axis=1)) for name, m in mask.items()
    }
    widths = {name: str(m.shape[1]) for name, m in mask.items()}
    save_file(packed, directory / FILE, metadata=widths)


def load_mask(directory: Any) -> dict[str, Tensor]:
    """What `save_mask` wrote.

    Raises:
        ProfileError: it is missing or unreadable: a reference is never left unpruned instead.
    """
    from safetensors import safe_open

    path = directory / FILE
    try:
        packed = load_file(path)
        with safe_open(path, framework="pt") as stored:
            widths = stored.metadata() or {}
        return {
            name: torch.from_numpy(
                np.unpackbits(bits.numpy(), axis=1, count=int(widths[name])).astype(bool)
            )
            for name, bits in packed.items()
        }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ProfileError(f"{path} cannot be read ({error}); {REBUILD}") from None


def _most_important(W: Tensor, norms: Tensor, share: float) -> Tensor:
    """The `share` of each row with the highest scores: ``(d_out, d_in)`` bool."""
    count = round(share * W.shape[1])
    scores = W.float().abs() * norms.to(W.device, torch.float32)
    chosen = torch.zeros(W.shape, dtype=torch.bool, device=W.device)
    return chosen.scatter_(1, scores.topk(count, dim=1).indices, True)

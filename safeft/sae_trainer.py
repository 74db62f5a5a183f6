"""The autoencoder's loss and one step of its training, on activations as plain tensors.

Source: arXiv 2406.04093, sections 2.3 and 2.4 and appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from safeft.errors import ProfileError, TrainingError
from safeft.sae import TopKAutoencoder
from safeft.sae_config import AutoencoderConfig

_INIT_TOKENS = 2048


class Loss(NamedTuple):
    """``total`` to minimise, its ``reconstruction`` part, and which latents fired: (n,) bool."""

    total: Tensor
    reconstruction: Tensor
    fired: Tensor


@dataclass(frozen=True)
class Weights:
    """The trained leaves: W_enc (n, d), b_enc (n,), atoms = W_decᵀ (n, d), b_dec (d,)."""

    W_enc: Tensor
    b_enc: Tensor
    atoms: Tensor
    b_dec: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.W_enc, self.b_enc, self.atoms, self.b_dec]


def autoencoder_loss(
    x: Tensor, weights: Weights, k: int, dead: Tensor, aux_k: int, aux_coefficient: float
) -> Loss:
    """``Σ‖x - x̂‖² / Σ‖x - mean‖²``, and the same of the error by dead latents: 2406.04093, A.2.

    The auxiliary term reconstructs the error e = x - x̂, as a constant, from the `aux_k` dead
    latents with the largest pre-activations: ``aux_coefficient · Σ‖e - ê‖² / Σ‖e - mean‖²``.

    Args:
        x: (B, d).
        dead: (n,) bool.
    """
    W_enc, b_enc, atoms, b_dec = weights.tensors()
    # (B, n); the bias is folded so that no gradient of size (B, d) is formed for b_dec.
    pre = F.linear(x, W_enc, b_enc - W_enc @ b_dec)
    values, indices = pre.topk(k, dim=-1, sorted=False)  # (B, k)
    values = values.relu()
    # k of n atoms a token: gathering them costs k/n of the dense product.
    error = x - b_dec - F.embedding_bag(indices, atoms, per_sample_weights=values, mode="sum")
    reconstruction = error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    fired = torch.zeros_like(dead)
    fired[indices[values > 0]] = True
    total = reconstruction
    candidates = dead.nonzero()[:, 0]  # (dead,)
    if candidates.numel() and aux_coefficient:
        e = error.detach()
        among = pre[:, candidates].topk(min(aux_k, candidates.numel()), dim=-1, sorted=False)
        chosen = candidates[among.indices]  # (B, aux_k)
        e_hat = F.embedding_bag(chosen, atoms, per_sample_weights=among.values.relu(), mode="sum")
        total = total + aux_coefficient * (e - e_hat).pow(2).sum() / (e - e.mean(0)).pow(2).sum()
    return Loss(total, reconstruction, fired)


class AutoencoderTrainer:
    """Adam on centred and scaled activations, with decoder columns of norm 1 after every step.

    `mean` (d,) and the scale come from the first activations: x = (h - mean) / scale has mean
    square norm 1 there. TopK is homogeneous, so both fold back into the weights exactly.
    """

    def __init__(self, first: Tensor, config: AutoencoderConfig, layer: int) -> None:
        """`first`: (N, d) fp32 activations that set the mean, the scale and the initialisation."""
        self.config, self.layer = config, layer
        self.mean = first.mean(0)
        self.scale = float((first - self.mean).pow(2).sum(1).mean().sqrt())
        if not self.scale > 0:
            raise ProfileError("all activations are the same: there is nothing to train on")
        d, n = first.shape[1], config.expansion * first.shape[1]
        if config.k > n:
            raise ProfileError(f"k: {config.k}, but there are only {n} latents; raise expansion")
        generator = torch.Generator().manual_seed(config.seed)
        atoms = F.normalize(torch.randn(n, d, generator=generator), dim=1).to(first.device)
        self.weights = Weights(
            atoms
            * _least_squares_scale(
                (first[:_INIT_TOKENS] - self.mean) / self.scale, atoms, config.k
            ),
            atoms.new_zeros(n),
            atoms,
            atoms.new_zeros(d),
        )
        for tensor in self.weights.tensors():
            tensor.requires_grad_()
        self._adam = torch.optim.Adam(self.weights.tensors(), lr=config.learning_rate)
        self._idle = torch.zeros(n, dtype=torch.int64, device=first.device)
        self.step_number = 0

    @property
    def dead(self) -> Tensor:
        """(n,) bool: active on none of the last `dead_after` activations."""
        return self._idle >= self.config.dead_after

    def step(self, h: Tensor) -> float:
        """One step on (B, d) activations; the reconstruction's loss before it.

        Raises:
            TrainingError: the loss is not finite.
        """
        config, atoms = self.config, self.weights.atoms
        loss = autoencoder_loss(
            (h - self.mean) / self.scale,
            self.weights,
            config.k,
            self.dead,
            config.aux_k,
            config.aux_coefficient,
        )
        if not torch.isfinite(loss.total):
            raise TrainingError(
                f"the autoencoder's loss is not finite at step {self.step_number + 1}: "
                "lower learning_rate"
            )
        loss.total.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            assert atoms.grad is not None
            # Along a column the gradient would only change its norm, which is set below.
            atoms.grad -= (atoms.grad * atoms).sum(1, keepdim=True) * atoms
            for group in self._adam.param_groups:
                group["lr"] = config.rate(self.step_number)
            self._adam.step()
            self._adam.zero_grad()
            atoms.copy_(F.normalize(atoms, dim=1))
            self._idle += h.shape[0]
            self._idle[loss.fired] = 0
        self.step_number += 1
        return loss.reconstruction.item()

    def autoencoder(self) -> TopKAutoencoder:
        """The autoencoder of raw activations as trained so far, in fp32."""
        W_enc, b_enc, atoms, b_dec = (t.detach() for t in self.weights.tensors())
        return TopKAutoencoder(
            W_enc.clone(),
            b_enc * self.scale,
            atoms.T.contiguous(),
            b_dec * self.scale + self.mean,
            k=self.config.k,
            layer=self.layer,
        )


def _least_squares_scale(x: Tensor, atoms: Tensor, k: int) -> float:
    """What the encoder, the decoder's transpose, has to be multiplied by.

    The atoms are not orthogonal, and without it the first reconstructions are far too long.
    """
    values, indices = (x @ atoms.T).topk(k, dim=-1, sorted=False)
    x_hat = F.embedding_bag(indices, atoms, per_sample_weights=values.relu(), mode="sum")
    return float((x * x_hat).sum() / x_hat.pow(2).sum())

"""CWAC's activation side: safety-critical latents stay where the base model has them.

Source: arXiv 2604.12384. ``L = λ · mean_b ‖z_b − z_b,base‖²`` over the chosen latents of a sparse
autoencoder on the residual stream, on a small batch of harmful prompts in every step. The forward
pass ends at the autoencoder's layer; the base model's latents are stored in the profile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safeft.constraints.base import ForwardTerm
from safeft.constraints.draw import draw
from safeft.errors import ProfileError, TrainingError
from safeft.stopped_forward import last_positions_after

if TYPE_CHECKING:
    from safeft.latents import ActivationTargets


class ActivationPenalty:
    """The penalty of one step, from a batch that all ranks draw alike and share out.

    Args:
        targets: of the base model's profile.
        lam: λ.
        batch: prompts a step over all ranks.
    """

    def __init__(self, targets: ActivationTargets, *, lam: float, batch: int) -> None:
        self._targets = targets
        self._autoencoder = targets.autoencoder
        self._lam = lam
        self._batch = min(batch, len(targets.prompts))

    def __call__(self, model: nn.Module, step: int) -> ForwardTerm:
        """This rank's share: the mean over the ranks is the penalty.

        Raises:
            ProfileError: the model's residual stream is not what the autoencoder reads.
            TrainingError: the penalty is not finite; the layer is named.
        """
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        drawn = self.drawn(step)
        own = drawn[rank::ranks]
        # A rank without a prompt runs one all the same: under ZeRO-3 all ranks gather together.
        z, base = self._latents(model, own or drawn[:1])
        share = 1.0 if own else 0.0
        weight = share * ranks / (len(drawn) * self._targets.positions)
        distance = (z - base).pow(2).sum() * weight
        sums = torch.stack([distance.detach(), base.pow(2).sum() * weight])
        if ranks > 1:
            dist.all_reduce(sums)
            sums /= ranks
        moved, held = sums.tolist()
        if not math.isfinite(moved):
            raise TrainingError(
                f"constraint cwac: the activation penalty at layer {self._autoencoder.layer} is "
                f"{moved}"
            )
        metrics = {"latent_drift": moved / held} if held > 0 else {}
        return ForwardTerm(self._lam * distance, self._lam * moved, metrics)

    def drawn(self, step: int) -> list[int]:
        """Numbers of the prompts of a step."""
        return draw(step, self._batch, len(self._targets.prompts))

    def _latents(self, model: nn.Module, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """The chosen latents now and in the base model: ``(b, positions, m)`` fp32 each."""
        targets, positions = self._targets, self._targets.positions
        prompts = [targets.prompts[index] for index in chosen]
        h = last_positions_after(model, self._autoencoder.layer, prompts, positions)
        if self._autoencoder.W_enc.shape[1] != h.shape[2]:
            raise ProfileError(
                f"constraint cwac: the autoencoder reads {self._autoencoder.W_enc.shape[1]} "
                f"numbers, the model's residual stream has {h.shape[2]}: the profile belongs to "
                "another model"
            )
        if self._autoencoder.W_enc.device != h.device:  # follow the model, once
            self._autoencoder = self._autoencoder.to(h.device, torch.float32)
        z = self._autoencoder.encode_latents(h.float(), targets.latents.to(h.device))
        return z, targets.baseline[chosen].to(h.device)

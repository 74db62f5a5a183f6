"""Which latents tell a harmful prompt that is refused from a benign one, and where they stand.

Source: CWAC, arXiv 2604.12384: the ~100 safety-critical latents and their baselines ``z_b,base``.
The paper does not say how latents are ranked; `rank_latents` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safeft.errors import ProfileError
from safeft.progress import Progress, silent
from safeft.sae import TopKAutoencoder, load_autoencoder, save_autoencoder
from safeft.stopped_forward import last_positions_after

_FORMAT = "safeft.activation_targets.1"
_FILE = "targets.safetensors"
_REBUILD = "run `safeft profile build --model MODEL --part autoencoder`"
_BATCH = 32
#: No latent's spread counts as less than this share of the mean spread.
STD_FLOOR = 0.1


@dataclass(frozen=True)
class ActivationTargets:
    """What the activation penalty holds a model to.

    Attributes:
        base_weights: hash of the weights that the baselines were computed with.
        autoencoder: n latents wide.
        latents: (m,) int64, the safety-critical ones, the most telling first.
        prompts: token ids of N harmful prompts, up to and with the template's opening of an answer.
        baseline: (N, positions, m) fp32, the base model's z at each prompt's last positions.
        positions: how many.
    """

    base_weights: str
    autoencoder: TopKAutoencoder
    latents: Tensor
    prompts: list[list[int]]
    baseline: Tensor
    positions: int


@dataclass(frozen=True)
class Ranking:
    """Latents (m,) int64 and their scores (m,) fp64, descending."""

    latents: Tensor
    scores: Tensor


def last_residuals(
    model: Any,
    layer: int,
    prompts: Sequence[Sequence[int]],
    positions: int,
    progress: Progress = silent,
) -> Tensor:
    """The residual stream after a layer at each prompt's last positions: (N, positions, d) fp32.

    Raises:
        ProfileError: a prompt is shorter than `positions`, or an activation is not finite.
    """
    if short := [len(p) for p in prompts if len(p) < positions]:
        raise ProfileError(f"positions: {positions}, but a prompt has only {short[0]} tokens")
    found: dict[int, Tensor] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for begin in range(0, len(order), _BATCH):
        progress("latents", begin, len(order))
        batch = order[begin : begin + _BATCH]
        with torch.no_grad():
            h = last_positions_after(model, layer, [prompts[i] for i in batch], positions)
        found.update(zip(batch, h.float(), strict=True))
    progress("latents", len(order), len(order))
    if not found:
        raise ProfileError("there is no prompt to compute latents on")
    residuals = torch.stack([found[i] for i in range(len(prompts))])
    if not torch.isfinite(residuals).all():
        raise ProfileError(
            f"the model's activations after layer {layer} are not finite: check its weights"
        )
    return residuals


def rank_latents(
    autoencoder: TopKAutoencoder, harmful: Tensor, benign: Tensor, count: int
) -> Ranking:
    """The latents that are most typical of harmful prompts that the base model refuses.

    A prompt's activation is its z, averaged over the positions. A latent's score is the difference
    of the two groups' means over the pooled standard deviation of the groups, which counts as at
    least `STD_FLOOR` of its mean over the latents that vary: a latent that hardly moves at all is
    not critical. Only latents that are higher on harmful prompts are taken.

    Args:
        harmful: (N, positions, d); benign: (M, positions, d). At least 2 prompts each.

    Raises:
        ProfileError: fewer than `count` latents are higher on harmful prompts, or too few prompts.
    """
    if min(len(harmful), len(benign)) < 2:
        raise ProfileError("at least 2 refused harmful and 2 benign prompts are needed")
    mean_h, squares_h = _moments(autoencoder, harmful)
    mean_b, squares_b = _moments(autoencoder, benign)
    spread = ((squares_h + squares_b) / (len(harmful) + len(benign) - 2)).sqrt()  # (n,)
    varying = spread[spread > 0]
    if not varying.numel():
        raise ProfileError("no latent varies over the prompts: the autoencoder is of another model")
    scores = (mean_h - mean_b) / spread.clamp(min=STD_FLOOR * float(varying.mean()))
    higher = int((scores > 0).sum())
    if higher < count:
        raise ProfileError(
            f"latents: {count}, but only {higher} are higher on refused harmful prompts; "
            "lower latents"
        )
    best = scores.topk(count)
    return Ranking(best.indices, best.values)


def _moments(autoencoder: TopKAutoencoder, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squared deviations, of prompts' mean activations: (n,) fp64 each."""
    values = torch.cat(
        [autoencoder.encode(part).double().mean(1) for part in torch.split(residuals, _BATCH)]
    )  # (N, n)
    mean = values.mean(0)
    return mean, (values - mean).pow(2).sum(0)


def activation_targets(
    base_weights: str,
    autoencoder: TopKAutoencoder,
    ranking: Ranking,
    prompts: Sequence[Sequence[int]],
    residuals: Tensor,
) -> ActivationTargets:
    """The base model's own latents as targets.

    Args:
        prompts, residuals: the harmful prompts, and `last_residuals` (N, positions, d) of them.
    """
    z = [
        autoencoder.encode_latents(part, ranking.latents) for part in torch.split(residuals, _BATCH)
    ]
    return ActivationTargets(
        base_weights,
        autoencoder,
        ranking.latents.cpu(),
        [list(prompt) for prompt in prompts],
        torch.cat(z).float().cpu(),
        residuals.shape[1],
    )


def save_activation_targets(
    targets: ActivationTargets, directory: Path, *, model_name: str | None = None
) -> None:
    """Write targets into an existing directory, beside their autoencoder as `safeft.sae` does.

    ``model_name``: written into the autoencoder's metadata, for SAELens.
    """
    save_autoencoder(targets.autoencoder, directory, {"model_name": model_name})
    tensors = {
        "latents": targets.latents,
        "baseline": targets.baseline,
        "prompt_tokens": torch.tensor([token for prompt in targets.prompts for token in prompt]),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in targets.prompts]),
    }
    metadata = {"format": _FORMAT, "base_weights": targets.base_weights}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / _FILE,
        metadata=metadata,
    )


def load_activation_targets(directory: Path) -> ActivationTargets:
    """The targets that `save_activation_targets` wrote, on the CPU.

    Raises:
        ProfileError: a file is missing, broken or something else, or what it holds does not fit
            together.
    """
    autoencoder = load_autoencoder(directory)
    path = directory / _FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ProfileError(f"{path}: cannot be read ({error}); {_REBUILD}") from None
    wanted = {"latents", "baseline", "prompt_tokens", "prompt_lengths"}
    if metadata.get("format") != _FORMAT or set(tensors) != wanted:
        raise ProfileError(f"{path}: does not hold activation targets; {_REBUILD}")
    latents, baseline = tensors["latents"], tensors["baseline"]
    lengths, tokens = tensors["prompt_lengths"].tolist(), tensors["prompt_tokens"]
    if baseline.dim() != 3 or baseline.shape[::2] != (len(lengths), len(latents)):
        raise ProfileError(f"{path}: baseline and prompts do not fit together; {_REBUILD}")
    if not torch.isfinite(baseline).all():
        raise ProfileError(f"{path}: baseline holds a NaN or an infinity; {_REBUILD}")
    if len(set(latents.tolist())) != len(latents) or not _within(latents, autoencoder.width):
        raise ProfileError(f"{path}: latents are not those of the autoencoder; {_REBUILD}")
    positions = baseline.shape[1]
    if not lengths or sum(lengths) != len(tokens) or min(lengths) < max(1, positions):
        raise ProfileError(f"{path}: prompts are broken or too short; {_REBUILD}")
    prompts = [part.tolist() for part in tokens.split(lengths)]
    return ActivationTargets(
        metadata["base_weights"], autoencoder, latents, prompts, baseline, positions
    )


def _within(indices: Tensor, size: int) -> bool:
    return indices.numel() > 0 and int(indices.min()) >= 0 and int(indices.max()) < size

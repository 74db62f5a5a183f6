"""Training a TopK autoencoder on activations that are streamed from the model.

Sources: arXiv 2406.04093 (the training), CWAC, arXiv 2604.12384 (what it is trained on, and for).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safeft.activation_stream import (
    ActivationBuffer,
    first_new_positions,
    massive_norm,
    stream_activations,
    without_massive,
)
from safeft.errors import ProfileError
from safeft.progress import Progress, silent
from safeft.sae import TopKAutoencoder
from safeft.sae_config import AutoencoderConfig
from safeft.sae_trainer import AutoencoderTrainer
from safeft.stopped_forward import decoder_layers

__all__ = [
    "AutoencoderConfig",
    "AutoencoderReport",
    "CurvePoint",
    "Reconstruction",
    "TrainedAutoencoder",
    "measure",
    "measure_on_texts",
    "require_explained",
    "train_autoencoder",
]

_CURVE_POINTS = 20
_CURVE_TOKENS = 2048  # held-out activations that the curve is measured on; the report reads all


@dataclass(frozen=True)
class Reconstruction:
    """How well an autoencoder gives activations back.

    Attributes:
        variance_explained: ``1 - Σ‖h - ĥ‖² / Σ‖h - mean‖²``, the mean over the same activations.
        l0: mean number of active latents.
        silent: share of the latents that are active on none of them.
        tokens: activations measured.
    """

    variance_explained: float
    l0: float
    silent: float
    tokens: int


@dataclass(frozen=True)
class AutoencoderReport:
    """What a training reached.

    Attributes:
        held_out: on activations of the texts that were not trained on.
        dead: share of the latents that were active on none of the last `dead_after` activations
            of the training.
        trained, read: activations drawn from the buffer, and read from the model.
        massive: activations left out for their norm, of those that were read.
        seconds: wall clock.
        curve: some 20 points of the training.
    """

    held_out: Reconstruction
    dead: float
    trained: int
    read: int
    massive: int
    seconds: float
    curve: list[CurvePoint]


@dataclass(frozen=True)
class CurvePoint:
    """Where a training was after a step.

    Attributes:
        trained: activations drawn so far.
        batch, held_out: variance explained on the step's batch and on a held-out sample.
        dead: latents that count as dead.
    """

    step: int
    trained: int
    batch: float
    held_out: float
    dead: int


@dataclass(frozen=True)
class TrainedAutoencoder:
    """An autoencoder, what it reached, the indices of the rows held out, and the massive norm."""

    autoencoder: TopKAutoencoder
    report: AutoencoderReport
    held_out: frozenset[int]
    limit: float


def train_autoencoder(
    model: Any,
    rows: Sequence[Sequence[int]],
    config: AutoencoderConfig,
    progress: Progress = silent,
) -> TrainedAutoencoder:
    """Train on the activations of some rows and measure on those of the others.

    The forward pass stops at the layer; activations are read a batch at a time, mixed in a bounded
    buffer and forgotten, and never written anywhere. Neither a training nor a measurement counts
    the first token of a row, a token that another row begins with (`first_new_positions`), or a
    massive activation (`safeft.activation_stream.MASSIVE`).

    Args:
        model: a causal language model of transformers, plain or wrapped by peft, in the mode and
            on the device where it is; it is run in evaluation mode.
        rows: token ids of texts, each at least 2 tokens. About 70 % harmful prompts that the model
            refuses and 30 % other text, says the paper.

    Raises:
        ProfileError: the variance explained is below ``config.min_variance_explained``; a layer
            or k that the model does not allow; activations that are not finite; too few texts.
        TrainingError: the loss is not finite.
    """
    begun = time.monotonic()
    layer = config.layer_of(len(decoder_layers(model.get_decoder())[1]))
    texts = [list(row) for row in rows]
    held_out = _held_out(len(texts), config)
    starts = first_new_positions(texts, held_out)
    order = random.Random(config.seed)

    def stream(held: bool, shuffled: bool = True) -> Iterator[Tensor]:
        chosen = [i for i in range(len(texts)) if (i in held_out) == held]
        return stream_activations(
            model,
            layer,
            [texts[i] for i in chosen],
            [starts[i] for i in chosen],
            order=order if shuffled else None,
        )

    new = sum(
        max(0, len(t) - s)
        for i, (t, s) in enumerate(zip(texts, starts, strict=True))
        if i not in held_out
    )
    was_training = model.training
    model.eval()
    try:
        generator = torch.Generator().manual_seed(config.seed)
        buffer = ActivationBuffer(
            lambda: stream(held=False),
            max(1, min(config.buffer_tokens, new)),
            config.uses,
            generator,
        )
        sample = _sample(stream(held=True), buffer.limit)
        trainer = AutoencoderTrainer(buffer.held, config, layer)
        curve = _train(trainer, buffer, sample, progress)
        autoencoder = trainer.autoencoder()
        reached = measure(autoencoder, stream(held=True, shuffled=False), buffer.limit)
    finally:
        model.train(was_training)
    require_explained(
        reached,
        config,
        f"raise k ({config.k}), steps ({config.steps}) or expansion ({config.expansion}), "
        f"give more texts ({len(texts)})",
    )
    report = AutoencoderReport(
        held_out=reached,
        dead=float(trainer.dead.float().mean()),
        trained=config.steps * config.batch_size,
        read=buffer.read,
        massive=buffer.left_out,
        seconds=time.monotonic() - begun,
        curve=curve,
    )
    return TrainedAutoencoder(autoencoder, report, held_out, buffer.limit)


def require_explained(reached: Reconstruction, config: AutoencoderConfig, remedy: str) -> None:
    """Raise ProfileError, with what to do, for an autoencoder that explains too little."""
    if not reached.variance_explained >= config.min_variance_explained:
        raise ProfileError(
            f"the autoencoder explains {reached.variance_explained:.3f} of the variance of "
            f"{reached.tokens} held-out activations, less than min_variance_explained = "
            f"{config.min_variance_explained}: {remedy}, or lower min_variance_explained"
        )


def measure_on_texts(
    model: Any, autoencoder: TopKAutoencoder, rows: Sequence[Sequence[int]]
) -> Reconstruction:
    """`measure` on all texts, for an autoencoder that was trained on none of them.

    Args and what is left out: as in `train_autoencoder`.
    """
    texts = [list(row) for row in rows]
    starts = first_new_positions(texts, frozenset(range(len(texts))))
    layer = autoencoder.layer
    first = next(stream_activations(model, layer, texts, starts), None)
    if first is None:
        raise ProfileError("there are no texts to measure the autoencoder on")
    return measure(
        autoencoder, stream_activations(model, layer, texts, starts), massive_norm(first)
    )


def _held_out(texts: int, config: AutoencoderConfig) -> frozenset[int]:
    count = max(1, round(config.held_out * texts))
    if texts < 2 or count >= texts:
        raise ProfileError(f"{texts} texts are too few to train on some and measure on others")
    return frozenset(random.Random(config.seed).sample(range(texts), count))


def _sample(activations: Iterator[Tensor], limit: float) -> Tensor:
    """The first held-out activations, (t, d) with t about `_CURVE_TOKENS`."""
    parts: list[Tensor] = []
    for chunk in activations:
        parts.append(without_massive(chunk, limit))
        if sum(part.shape[0] for part in parts) >= _CURVE_TOKENS:
            break
    if not parts:
        raise ProfileError("the held-out texts have no activation of their own: give more texts")
    return torch.cat(parts)[:_CURVE_TOKENS]


def _train(
    trainer: AutoencoderTrainer, buffer: ActivationBuffer, sample: Tensor, progress: Progress
) -> list[CurvePoint]:
    config = trainer.config
    every = max(1, config.steps // _CURVE_POINTS)
    curve: list[CurvePoint] = []
    batches = buffer.batches(config.batch_size)
    for step in range(1, config.steps + 1):
        progress("autoencoder", step - 1, config.steps)
        loss = trainer.step(next(batches))
        if step % every == 0 or step == config.steps:
            curve.append(
                CurvePoint(
                    step,
                    step * config.batch_size,
                    1 - loss,
                    measure(trainer.autoencoder(), [sample]).variance_explained,
                    int(trainer.dead.sum()),
                )
            )
    progress("autoencoder", config.steps, config.steps)
    return curve


def measure(
    autoencoder: TopKAutoencoder, activations: Iterable[Tensor], limit: float = math.inf
) -> Reconstruction:
    """How well activations are given back; sums in fp64, a chunk at a time.

    Args:
        activations: chunks of (t, d).
        limit: those of a larger norm are left out, as massive.

    Raises:
        ProfileError: there are none, or they are all the same.
    """
    tokens, active, error, squares = 0, 0, 0.0, 0.0
    total: Tensor | None = None
    fired = torch.zeros(autoencoder.width, dtype=torch.bool, device=autoencoder.W_enc.device)
    with torch.no_grad():
        for chunk in activations:
            h = without_massive(chunk, limit)
            z = autoencoder.encode(h)
            error += float((h.double() - autoencoder.decode(z)).pow(2).sum())
            squares += float(h.double().pow(2).sum())
            total = h.double().sum(0) + (0 if total is None else total)
            active += int((z > 0).sum())
            fired |= (z > 0).any(0)
            tokens += h.shape[0]
    spread = squares - float(total.pow(2).sum()) / tokens if total is not None and tokens else 0.0
    if not spread > 0:
        raise ProfileError("no activations that differ to measure the autoencoder on: more texts")
    return Reconstruction(
        1 - error / spread, active / tokens, float((~fired).float().mean()), tokens
    )

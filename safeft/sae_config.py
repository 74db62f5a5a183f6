"""The settings of the autoencoder's training, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from safeft.errors import ProfileError


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder is trained and what is taken from it. The paper leaves all of it open.

    Attributes:
        depth: the layer as a share of the decoder's layers, unless `layer` is given.
        layer: 0-based decoder layer whose output is read.
        expansion: latents for each dimension of the residual stream.
        k: latents that a token may have.
        learning_rate, warmup_steps: Adam's; the rate rises linearly, stays, and falls linearly to 0
            over the last `decay` of the steps.
        steps, batch_size: training steps, and activations a step.
        buffer_tokens, uses: activations held for shuffling, and how often each is drawn on average;
            the model runs over about steps · batch_size / uses tokens.
        dead_after: a latent is dead once it was active on none of so many activations.
        aux_k, aux_coefficient: dead latents that reconstruct the error, and that term's weight.
        held_out: share of the texts that is measured on, never trained on.
        min_variance_explained: on held-out activations; below it there is no autoencoder.
        positions: last prompt positions that latents are ranked and held at; None: the tokens that
            the chat template puts after the instruction.
        latents: how many safety-critical latents are held. The paper's 100.
        seed: of the initialisation, the held-out texts and the order.

    Raises:
        ValueError: a field outside its range; it is named.
    """

    depth: float = 0.5
    layer: int | None = None
    expansion: int = 4
    k: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    decay: float = 0.8
    steps: int = 1000
    batch_size: int = 512
    buffer_tokens: int = 32768
    uses: float = 8.0
    dead_after: int = 30_000
    aux_k: int = 256
    aux_coefficient: float = 1 / 32
    held_out: float = 0.1
    min_variance_explained: float = 0.9
    positions: int | None = None
    latents: int = 100
    seed: int = 0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        at_least_1 = ["expansion", "k", "steps", "batch_size", "buffer_tokens", "dead_after"]
        for name in [*at_least_1, "aux_k", "latents"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("warmup_steps", "aux_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative")
        for name in ("depth", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1")
        for name in ("decay", "min_variance_explained"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1")
        for name in ("learning_rate", "uses"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive")
        if self.layer is not None and self.layer < 0:
            raise ValueError("layer must not be negative")
        if self.positions is not None and self.positions < 1:
            raise ValueError("positions must be at least 1")

    def layer_of(self, layers: int) -> int:
        """The 0-based layer that is read in a model of so many decoder layers.

        Raises:
            ProfileError: the model has no such layer.
        """
        layer = int(self.depth * layers) if self.layer is None else self.layer
        if layer >= layers:
            raise ProfileError(f"layer: {layer}, but the model's layers are 0 to {layers - 1}")
        return layer

    def rate(self, step: int) -> float:
        """Learning rate of a 0-based step."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        falling = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * rising * falling

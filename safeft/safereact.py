"""SafeReAct's loss: representations of harmful prompts go where a reference has them, others stay.

Source: arXiv 2604.00012 (NeurIPS 2025). With ``p = t / (1.5·T)`` in step t = 1..T:

    loss = α·p·mean‖h − h_orig‖₂ + α·(1 − p)·mean‖h_harmful − h_ref‖₂

The norm is over the hidden dimension, the mean over the representation layers and real positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safeft.constraints.base import ProfileFiles
    from safeft.constraints.reactivation import Reactivation

#: The paper's representation layers, as indices of hidden states (0: the embeddings) of 28 layers.
_PAPER_LAYERS, _PAPER_DEPTH = (5, 10, 15, 20, 25, 27), 28

REMINDER = "Remember: never write anything harmful or misleading, and decline harmful requests."

Place = Literal["end", "start"]
ComparedAt = Literal["prompt", "response", "both"]


@dataclass(frozen=True)
class SafeReactConfig:
    """The loss and its schedule.

    Args:
        alpha: α.
        steps: T, optimizer steps. The paper's are 400.
        harmful_batch: rows of a step that are brought back, over all workers. The paper's are 16.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    parts: ClassVar[tuple[str, ...]] = ("reactivation",)

    kind: Literal["safereact"] = "safereact"
    alpha: float = 10.0
    steps: int = 60
    harmful_batch: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, not {self.alpha}")
        for field in ("steps", "harmful_batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")

    def coefficients(self, step: int) -> tuple[float, float]:
        """α·p and α·(1 − p) of the 0-based `step`: of what is retained, and of what comes back."""
        p = (step + 1) / (1.5 * self.steps)
        return self.alpha * p, self.alpha * (1 - p)

    def build(self, profile: ProfileFiles) -> Reactivation:
        """What a training run needs of it.

        Raises:
            ProfileError: the targets are missing or unreadable.
        """
        from safeft.constraints.reactivation import Reactivation
        from safeft.reactivation_targets import load_targets

        return Reactivation(self, load_targets(profile.part("reactivation", self.kind)))


@dataclass(frozen=True)
class ReferenceConfig:
    """What the harmful prompts' representations are brought back to.

    Args:
        prompts: at most so many of the harmful prompts that the base model refuses.
        borderline_prompts: at most so many borderline-benign prompts that the base model answers:
            they go where the base model has them too, so that its own line between harmful and
            borderline comes back and not refusing alone. 0: none, as in the paper, which retains
            such prompts where the tuned model has them (`borderline_rows` of a restoration).
        domain_prompts: benign prompts that stand for the domain, where the reference is the base.
        layers: 0-based decoder layers whose outputs are compared; None: the paper's six, at the
            same depths.
        domain_share, safety_share: p and q of the set difference; shares of each row of a weight.
            p = 0: the reference is not pruned.
        reminder: inserted into the harmful prompt that the reference reads; empty: none.
        place: where: at the `end` of the user's turn (the official code), or at its `start`.
        at: positions that are compared, counted from the end of both texts. `prompt`: as many as
            the bare prompt has (the paper). `response`: the template after the instruction and the
            base model's own refusal, so where the refusal is produced. `both`: all of them. A
            row's first token is never compared: it reads nothing but itself, and as an attention
            sink its state is thousands long.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    prompts: int = 160
    borderline_prompts: int = 192
    domain_prompts: int = 160
    layers: tuple[int, ...] | None = None
    domain_share: float = 0.01
    safety_share: float = 0.05
    reminder: str = REMINDER
    place: Place = "end"
    at: ComparedAt = "response"

    def __post_init__(self) -> None:
        for field in ("prompts", "domain_prompts"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1")
        if self.borderline_prompts < 0:
            raise ValueError("borderline_prompts must be at least 0")
        for field in ("domain_share", "safety_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be in [0, 1]")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be in rising order, each once")
        if self.layers == ():
            raise ValueError("layers must name a layer")


def representation_layers(depth: int) -> tuple[int, ...]:
    """The paper's layers for a decoder of `depth` layers, as 0-based layers whose output counts."""
    states = (round(index * depth / _PAPER_DEPTH) for index in _PAPER_LAYERS)
    return tuple(sorted({max(0, state - 1) for state in states}))


def distances(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """``‖now − then‖₂`` at each position, mean over layers.

    Args:
        now, then: for each layer ``(n, d)``, at the positions that count: none is padding.

    Returns:
        ``(n,)`` fp32, differentiable in `now`; its gradient is 0 where both are equal.
    """
    norms = [
        torch.linalg.vector_norm(a.float() - b.float(), dim=-1)
        for a, b in zip(now, then, strict=True)
    ]
    return torch.stack(norms).mean(0)


def safereact_loss(retained: Tensor, harmful: Tensor, coefficients: tuple[float, float]) -> Tensor:
    """The loss of one step, from all `distances` of the retained rows and of the harmful prompts.

    Args:
        retained: ``(n,)``, ``‖h − h_orig‖₂``.
        harmful: ``(m,)``, ``‖h_harmful − h_ref‖₂``.
        coefficients: of `SafeReactConfig.coefficients`.
    """
    keep, bring_back = coefficients
    return keep * retained.mean() + bring_back * harmful.mean()

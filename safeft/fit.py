"""A small single-process loop that trains one LoRA adapter: alignment and profile directions.

Tenants' jobs are trained by ``jobs.finetune`` on Ray Train and DeepSpeed; what is here needs torch
and peft alone and takes minutes on a laptop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache

from safeft.adapters import require_plain_head
from safeft.data import TokenisedRow, collate
from safeft.data.tokenise import IGNORED
from safeft.errors import TrainingError
from safeft.label_logits import label_logits
from safeft.progress import Progress, silent
from safeft.weights import decoder_linears

T = TypeVar("T")
BUCKET_BATCHES = 8  # batches that are sorted by length together: little padding, still well mixed


@dataclass(frozen=True)
class FitConfig:
    """How one adapter is trained. The rate warms up linearly, then follows a cosine to 5 %.

    Raises:
        ValueError: a field outside its range.
    """

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    batch_size: int = 16
    steps: int = 100
    warmup_steps: int = 6
    seed: int = 0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for field in ("rank", "alpha", "batch_size", "steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError("learning_rate must be positive")

    def rate(self, step: int) -> float:
        """Learning rate of a 0-based step."""
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps)) * cosine


def new_adapter(model: Any, config: FitConfig, first_layer: int = 0) -> Any:
    """Wrap a base model with a fresh LoRA on all linear layers of the decoder; seeded.

    ``first_layer``: decoder layers before it get no adapter, and no backward pass.
    """
    require_plain_head(model)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(decoder_linears(model, first_layer)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def response_nll(model: Any, rows: Sequence[TokenisedRow], pad_token_id: int) -> Tensor:
    """Mean negative log-likelihood of each row's trained tokens: (B,), fp32, differentiable.

    Two savings that change nothing but the time: the head runs at label positions only, and the
    tokens that all rows begin with (the template's system message) go through the model once.
    """
    batch = collate(rows, pad_token_id)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(base.parameters()).device
    ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)  # (B, T)
    shared = _shared_prefix(ids, labels)
    cache = DynamicCache(config=base.config)
    if shared:
        base.get_decoder()(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))  # differentiable: gradients flow to the one prefix
    logits, targets = label_logits(
        base,
        ids[:, shared:],
        labels[:, shared:],
        past_key_values=cache if shared else None,
        use_cache=bool(shared),
    )
    wanted = labels[:, shared + 1 :] != IGNORED  # (B, T - shared - 1)
    nll = torch.zeros(wanted.shape, device=device)
    nll[wanted] = F.cross_entropy(logits, targets, reduction="none")
    return nll.sum(1) / wanted.sum(1)


def _shared_prefix(ids: Tensor, labels: Tensor) -> int:
    """Length of the prefix all rows share, ending before the position that predicts a label."""
    differs = (ids != ids[:1]).any(0)
    trained = (labels != IGNORED).any(0)
    first_difference = int(differs.int().argmax()) if differs.any() else ids.shape[1]
    return max(0, min(first_difference, int(trained.int().argmax()) - 1))


def fit_adapter(
    model: Any,
    items: Sequence[T],
    *,
    length: Callable[[T], int],
    loss: Callable[[list[T]], Tensor],
    config: FitConfig,
    label: str,
    progress: Progress = silent,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train the model's trainable parameters for ``config.steps`` AdamW steps.

    Args:
        items: rows or pairs; ``length`` gives an item's tokens, ``loss`` a batch's scalar loss.
        after_step: called with the number of steps taken, after each.

    Returns:
        The loss of each step.

    Raises:
        TrainingError: the loss or the gradient became NaN or infinite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=0.0)
    batches = _endless_batches(items, length, config.batch_size, config.seed)
    losses: list[float] = []
    model.train()
    for step in range(config.steps):
        progress(label, step, config.steps)
        value = loss(next(batches))
        value.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        if not (torch.isfinite(value) and torch.isfinite(norm)):
            raise TrainingError(f"{label}: loss or gradient not finite at step {step + 1}")
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
        if after_step is not None:
            after_step(step + 1)
    progress(label, config.steps, config.steps)
    model.eval()
    return losses


def _endless_batches(
    items: Sequence[T], length: Callable[[T], int], size: int, seed: int
) -> Iterator[list[T]]:
    if not items:
        raise TrainingError("there is nothing to train on")
    order_of = random.Random(seed)
    while True:
        order = list(range(len(items)))
        order_of.shuffle(order)
        batches: list[list[T]] = []
        for start in range(0, len(order), size * BUCKET_BATCHES):
            bucket = sorted(
                order[start : start + size * BUCKET_BATCHES], key=lambda i: length(items[i])
            )
            batches += [
                [items[i] for i in bucket[j : j + size]] for j in range(0, len(bucket), size)
            ]
        order_of.shuffle(batches)
        yield from batches

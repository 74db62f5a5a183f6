"""The running batch: one row an answer, each with its own adapter, length and way of sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from cluster.serving.engine import Delta, Request
from cluster.serving.kv_cache import RowCache, require_plain_cache
from cluster.serving.lora import LoraSlots, LoraWeights
from cluster.serving.sampling import choose, new_generator
from cluster.serving.text import TextStream


@dataclass(eq=False)
class Job:
    """One request: its answers share a fate.

    Attributes:
        open: answers that are not finished.
        over: nothing more is delivered; its answers leave before the next step.
        stop: what `cancel` calls.
    """

    request: Request
    deliver: Callable[[Delta], None]
    stop: Callable[[Job], None]
    open: int = 0
    over: bool = False

    def cancel(self) -> None:
        """See Ticket."""
        self.stop(self)


@dataclass(eq=False)
class Answer:
    """One of a request's answers, in the queue or in the batch."""

    job: Job
    index: int
    generator: torch.Generator | None
    text: TextStream
    tokens: list[int] = field(default_factory=list)
    started: float = 0.0

    @staticmethod
    def all_of(job: Job, tokenizer: Any) -> list[Answer]:
        """Every answer of a request."""
        sampling = job.request.sampling
        return [
            Answer(job, i, new_generator(sampling, i), TextStream(tokenizer, sampling.stop))
            for i in range(job.request.n)
        ]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The request's prompt."""
        return self.job.request.prompt


class Batch:
    """Up to `size` answers that are generated together. One thread uses it.

    Args:
        model: a causal language model; its linear layers are replaced.
        pad: any token id, for the padding of a prefill.
        weights: gives the matrices of an adapter by its hash.

    Raises:
        ModelError: the model's attention is of a kind that cannot be batched like this.
    """

    def __init__(
        self, model: Any, size: int, pad: int, weights: Callable[[str], LoraWeights]
    ) -> None:
        require_plain_cache(model)
        self.size, self.rows = size, list[Answer]()
        self._model, self._pad, self._weights = model, pad, weights
        self._slots = LoraSlots(model, size)
        self._cache = self._new_cache()

    def prefill(self, joining: list[Answer]) -> list[int]:
        """Take in new answers as the last rows; the first token of each."""
        width = max(len(answer.prompt) for answer in joining)
        padding = [width - len(answer.prompt) for answer in joining]
        tokens = [[self._pad] * n + list(a.prompt) for n, a in zip(padding, joining, strict=True)]
        device = self._model.device
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device)
        self._use_adapters(joining)
        filled = DynamicCache(config=self._model.config)
        out = self._model(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=filled,
            use_cache=True,
            logits_to_keep=1,
        )
        now = time.monotonic()
        for row, answer in enumerate(joining):
            self._cache.join(filled, row, padding[row])
            answer.started = now
            self.rows.append(answer)
        return self._choose(out.logits[:, -1], joining)

    def step(self) -> list[int]:
        """The next token of each row."""
        device = self._model.device
        mask, positions = self._cache.next_step(device, self._model.dtype)
        self._use_adapters(self.rows)
        out = self._model(
            input_ids=torch.tensor([[answer.tokens[-1]] for answer in self.rows], device=device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache.cache,
            use_cache=True,
        )
        return self._choose(out.logits[:, -1], self.rows)

    def leave(self, row: int) -> Answer:
        """Let an answer out; the last row moves into its place."""
        answer = self.rows[row]
        self._cache.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        return answer

    def clear(self) -> list[Answer]:
        """Let everybody out, whatever state a failed step left behind."""
        rows, self.rows = self.rows, []
        self._cache = self._new_cache()
        return rows

    def forget(self, weights: str) -> None:
        """An adapter is no longer in memory."""
        self._slots.forget(weights)

    def _use_adapters(self, answers: list[Answer]) -> None:
        self._slots.use([answer.job.request.weights for answer in answers], self._weights)

    def _choose(self, logits: torch.Tensor, answers: list[Answer]) -> list[int]:
        return choose(logits, [(a.job.request.sampling, a.generator) for a in answers])

    def _new_cache(self) -> RowCache:
        return RowCache(self._model.config.num_hidden_layers, self.size)

"""Activations of one layer, streamed from the model: each distinct one once, few at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from safeft.data import pad_right, token_batches
from safeft.errors import ProfileError
from safeft.stopped_forward import residual_after

FORWARD_TOKENS = 4096  # padded tokens that go through the model at a time
BUCKET_BATCHES = 8  # batches that are sorted by length together
#: A token whose norm is above this many medians is a massive activation.
MASSIVE = 10.0

Tokens = list[int]


def first_new_positions(rows: Sequence[Tokens], held_out: frozenset[int]) -> list[int]:
    """Where each row stops repeating what is counted already: a list as long as `rows`.

    The activation at a position depends on the tokens up to it, so rows that begin alike (with the
    template's system message, say) share their first activations. A training row starts where it
    leaves the other training rows, a held-out row where it leaves all others: what is held out has
    never been trained on, and nothing is counted twice. Position 0 is never counted: in most
    models its activation is massive (`MASSIVE`), the same in every row, and explains anything.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    starts = [1] * len(rows)
    # In sorted order nothing shares more with a row than one of its two neighbours does.
    last: dict[bool, Tokens] = {}
    for i in order:
        held = i in held_out
        for group, row in last.items():
            if held or not group:
                starts[i] = max(starts[i], _shared(row, rows[i]))
        last[held] = rows[i]
    following: Tokens = []
    for i in reversed(order):
        if i in held_out:
            starts[i] = max(starts[i], _shared(following, rows[i]))
        else:
            following = rows[i]
    return starts


def _shared(a: Tokens, b: Tokens) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def stream_activations(
    model: Any,
    layer: int,
    rows: Sequence[Tokens],
    starts: Sequence[int],
    *,
    order: random.Random | None = None,
) -> Iterator[Tensor]:
    """One pass over the rows: their activations from their start on, (t, d) fp32, a batch a time.

    The tokens that a whole batch begins with go through the model once and are left out.

    Args:
        layer: 0-based decoder layer whose output is read.
        starts: of each row, the first position that counts.
        order: shuffles rows and batches; None: as they are.

    Raises:
        ProfileError: an activation is not finite.
    """
    chosen = [i for i in range(len(rows)) if starts[i] < len(rows[i])]
    for batch in _batches(chosen, [len(row) for row in rows], order):
        with torch.no_grad():
            h, shared = _residuals(model, layer, [rows[i] for i in batch])  # (B, T - shared, d)
        kept = [
            h[b, max(0, starts[i] - shared) : len(rows[i]) - shared] for b, i in enumerate(batch)
        ]
        activations = torch.cat(kept).float()
        if not torch.isfinite(activations).all():
            raise ProfileError(
                f"the model's activations after layer {layer} are not finite: check its weights"
            )
        yield activations


def _batches(chosen: list[int], lengths: list[int], order: random.Random | None) -> list[list[int]]:
    """Row indices in batches of similar length, `FORWARD_TOKENS` padded tokens each."""
    if order is None:
        return token_batches(lengths, FORWARD_TOKENS, among=chosen)
    order.shuffle(chosen)
    batches = []
    typical = max(1, sum(lengths) // max(1, len(lengths)))
    window = max(1, BUCKET_BATCHES * FORWARD_TOKENS // typical)
    for begin in range(0, len(chosen), window):
        bucket = token_batches(lengths, FORWARD_TOKENS, among=chosen[begin : begin + window])
        order.shuffle(bucket)
        batches += bucket
    return batches


def _residuals(model: Any, layer: int, rows: list[Tokens]) -> tuple[Tensor, int]:
    """(B, T - shared, d), right-padded, and how many tokens the rows share at their beginning."""
    device = next(model.parameters()).device
    shared = min(_shared(min(rows), max(rows)), min(map(len, rows)) - 1) if len(rows) > 1 else 0
    ids = pad_right([row[shared:] for row in rows], 0)
    if not shared:
        return residual_after(model, layer, ids.to(device)), 0
    cache = DynamicCache()
    prefix = torch.tensor([rows[0][:shared]], device=device)
    residual_after(model, layer, prefix, past_key_values=cache)
    cache.batch_repeat_interleave(len(rows))
    return residual_after(model, layer, ids.to(device), past_key_values=cache), shared


def massive_norm(activations: Tensor) -> float:
    """The norm above which an activation beside these (t, d) is massive."""
    return MASSIVE * float(activations.pow(2).sum(1).sqrt().median())


def without_massive(activations: Tensor, limit: float) -> Tensor:
    """Those of (t, d) whose norm is at most `limit`."""
    return activations[activations.pow(2).sum(1).sqrt() <= limit]


class ActivationBuffer:
    """A bounded shuffle buffer: random batches out of a stream that is in no random order.

    It is filled to its capacity, gives batches, forgets its older half and fills up again, so that
    an activation is drawn `uses` times on average. Massive activations do not enter.

    Attributes:
        held: (capacity, d) fp32: with the batch that is being read, all activations in memory.
        limit: the norm above which an activation is massive, `MASSIVE` medians of the first batch.
        read, left_out: activations that entered so far, and massive ones that did not.

    Raises:
        ProfileError: a pass over the rows gives nothing.
    """

    def __init__(
        self,
        passes: Callable[[], Iterator[Tensor]],
        capacity: int,
        uses: float,
        generator: torch.Generator,
    ) -> None:
        """`passes` begins another pass over the rows each time that it is called."""
        self._passes, self._pass = passes, passes()
        self._capacity, self._uses, self._generator = capacity, uses, generator
        self._pending: list[Tensor] = []
        self._read_before_pass = 0
        self.limit = float("inf")
        self.read = self.left_out = 0
        self.held = self._filled_up([])

    def batches(self, size: int) -> Iterator[Tensor]:
        """(size, d) fp32, drawn with replacement, without end."""
        half = max(1, self._capacity // 2)
        while True:
            for _ in range(max(1, round(self._uses * half / size))):
                drawn = torch.randint(self._capacity, (size,), generator=self._generator)
                yield self.held[drawn.to(self.held.device)]
            self.held = self._filled_up([self.held[half:]])

    def _filled_up(self, parts: list[Tensor]) -> Tensor:
        missing = self._capacity - sum(part.shape[0] for part in parts)
        while missing:
            chunk = self._pending.pop() if self._pending else self._next()
            if chunk.shape[0] > missing:
                self._pending.append(chunk[missing:])
            parts.append(chunk[:missing])
            missing -= parts[-1].shape[0]
        return torch.cat(parts)

    def _next(self) -> Tensor:
        chunk = next(self._pass, None)
        if chunk is None:
            if self.read == self._read_before_pass:
                raise ProfileError(
                    "the texts give the autoencoder no activation that differs from the others: "
                    "give it more of them"
                )
            self._pass, self._read_before_pass = self._passes(), self.read
            return self._next()
        if self.limit == float("inf"):
            self.limit = massive_norm(chunk)
        kept = without_massive(chunk, self.limit)
        self.read += kept.shape[0]
        self.left_out += chunk.shape[0] - kept.shape[0]
        return kept

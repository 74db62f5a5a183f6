"""Keys and values of the sequences in a batch, each in a row of its own that never moves right.

Sequences of different lengths share a batch without padding between them: row i holds its tokens
from position 0 on, and the attention mask hides what lies behind. So a sequence joins or leaves
without a copy of the others, and a step appends without one (transformers' DynamicCache
concatenates, that is copies, the whole cache in every step).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from safeft.errors import ModelError

_BLOCK = 128  # positions that are allocated at a time


def require_plain_cache(model: Any) -> None:
    """Raise ModelError for a model whose cache is more than keys and values of every token."""
    layers = DynamicCache(config=model.config).layers
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if other:
        raise ModelError(
            f"the model's attention needs {', '.join(other)}; this engine serves models with full "
            "attention in every layer"
        )


class RowCache:
    """The cache of up to `rows` sequences. Rows 0 to `len(lengths) - 1` are in use."""

    def __init__(self, layers: int, rows: int) -> None:
        self._rows = rows
        self.lengths: list[int] = []
        self.at = torch.zeros(0, dtype=torch.long)  # where each row's next token goes
        self.width = 0  # columns that attention looks at
        self._layers = [_RowLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=list(self._layers))

    def join(self, filled: Any, row: int, padding: int) -> None:
        """Take over a prefilled sequence as the next row.

        Args:
            filled: the DynamicCache of the prefill.
            row: which of its rows.
            padding: left padding of that row, which is left out.
        """
        mine = len(self.lengths)
        assert mine < self._rows, "no free row"
        for layer, other in zip(self._layers, filled.layers, strict=True):
            layer.write(mine, other.keys[row, :, padding:], other.values[row, :, padding:])
        self.lengths.append(filled.layers[0].keys.shape[2] - padding)

    def leave(self, row: int) -> None:
        """Free a row: the last one moves into its place.

        What is free is zero: the mask hides what lies behind a sequence, but not if it is NaN.
        """
        last = len(self.lengths) - 1
        length = self.lengths[last]
        for layer in self._layers:
            if row != last:
                layer.move(last, row, length)
                layer.wipe(row, length, self.lengths[row])
            layer.wipe(last, 0, length)
        self.lengths[row] = length
        self.lengths.pop()

    def next_step(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Before a step in which every row gets one token.

        Returns:
            Attention mask (rows, 1, 1, width), added to the scores; positions (rows, 1).
        """
        self.at = torch.tensor(self.lengths, device=device)
        self.width = max(self.lengths) + 1
        hidden = torch.arange(self.width, device=device)[None] > self.at[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        self.lengths = [length + 1 for length in self.lengths]
        return mask[:, None, None], self.at[:, None]

    def room(self, needed: int) -> int:
        """Positions to allocate so that `needed` fit."""
        return -(-needed // _BLOCK) * _BLOCK

    @property
    def rows(self) -> int:
        """The most sequences it can hold."""
        return self._rows


class _RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (rows, heads, positions, head size)."""

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.keys: Any = None  # a Tensor after the first `_reserve`
        self.values: Any = None
        self._owner = owner

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token to each row; what the rows' queries may look at."""
        owner = self._owner
        self._reserve(key_states, owner.width)
        rows = torch.arange(len(owner.at), device=key_states.device)
        self.keys[rows, :, owner.at] = key_states[:, :, 0]
        self.values[rows, :, owner.at] = value_states[:, :, 0]
        seen = slice(0, len(owner.at)), slice(None), slice(0, owner.width)
        return self.keys[seen], self.values[seen]

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Put a sequence's (heads, length, head size) at the start of a row."""
        self._reserve(keys[None], keys.shape[1])
        self.keys[row, :, : keys.shape[1]] = keys
        self.values[row, :, : values.shape[1]] = values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row into another row."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def wipe(self, row: int, start: int, end: int) -> None:
        """Set positions `start` to `end` of a row to zero."""
        self.keys[row, :, start:end] = 0
        self.values[row, :, start:end] = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Part of transformers' interface; `_reserve` allocates."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Part of transformers' interface; the mask is our own."""
        return self._owner.width, 0

    def get_seq_length(self) -> int:
        """Part of transformers' interface; the positions are our own."""
        return self._owner.width - 1

    def get_max_length(self) -> int:
        """Part of transformers' interface: no limit of its own."""
        return -1

    def _reserve(self, like: Tensor, positions: int) -> None:
        have = 0 if self.keys is None else self.keys.shape[2]
        if positions <= have:
            return
        shape = (self._owner.rows, like.shape[1], self._owner.room(positions), like.shape[3])
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        if have:
            keys[:, :, :have], values[:, :, :have] = self.keys, self.values
        self.keys, self.values, self.is_initialized = keys, values, True

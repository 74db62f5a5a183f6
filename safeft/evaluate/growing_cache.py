"""Keys and values of a batch that grow in place.

transformers' DynamicCache concatenates, that is copies, all of them for every new token: a quarter
of the time that short answers of a small model took.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_BLOCK = 64  # positions that are allocated at a time


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose ``keys`` and ``values``, (B, H, T, D), are the used part of something
    longer. What replaces them (a crop, a repetition) is copied when it grows next."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        self._used: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens, (B, H, new, D); all keys and values, (B, H, T, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        room = self._room
        if room is None or self.keys is not self._used or room[0].shape[-2] < end:
            room = _longer(self.keys, key_states, end), _longer(self.values, value_states, end)
            self._room = room
        for place, new in zip(room, (key_states, value_states), strict=True):
            place[..., length:end, :] = new
        self.keys, self.values = room[0][..., :end, :], room[1][..., :end, :]
        self._used = self.keys
        return self.keys, self.values


def _longer(old: Tensor, new: Tensor, end: int) -> Tensor:
    """Room for `end` positions and some more, with `old` (empty at first) at its beginning."""
    batch, heads, _, dim = new.shape
    room = new.new_empty(batch, heads, end + _BLOCK, dim)
    if old.numel():
        room[..., : old.shape[-2], :] = old
    return room


def growing_cache(config: Any) -> DynamicCache | None:
    """An empty cache; None where a layer keeps more than keys and values of every token."""
    cache = DynamicCache(config=config)
    if {type(layer) for layer in cache.layers} != {DynamicLayer}:
        return None
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache

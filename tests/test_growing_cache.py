"""A cache that grows in place holds what transformers' own cache holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from safeft.evaluate.growing_cache import GrowingLayer, growing_cache

STEPS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 90)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("crop"), st.integers(0, 3)),
    st.tuples(st.just("select"), st.integers(0, 5)),
)


@given(st.lists(STEPS, min_size=1, max_size=8), st.integers(0, 2**31))
def test_after_any_steps_keys_and_values_are_those_of_the_library(
    steps: list[tuple[str, int]], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    mine, library, batch = GrowingLayer(), DynamicLayer(), 2
    for what, number in [("update", 2), *steps, ("update", 1)]:
        if what == "update":
            new = torch.randn(2, batch, 3, number, 4, generator=draw)
            found = mine.update(new[0], new[1])
            wanted = library.update(new[0], new[1])
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        elif what == "repeat" and batch < 8:
            mine.batch_repeat_interleave(number)
            library.batch_repeat_interleave(number)
            batch *= number
        elif what == "crop" and number < library.get_seq_length():
            mine.crop(-number)
            library.crop(-number)
        elif what == "select":
            rows = torch.arange(batch).roll(number)
            mine.batch_select_indices(rows)
            library.batch_select_indices(rows)
        assert mine.get_seq_length() == library.get_seq_length()
        assert torch.equal(mine.keys, library.keys)
        assert torch.equal(mine.values, library.values)


def test_a_new_token_copies_nothing_of_what_is_there() -> None:
    layer = GrowingLayer()
    layer.update(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2))
    place = layer.keys.data_ptr()
    for _ in range(32):
        layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert layer.keys.data_ptr() == place
    assert layer.get_seq_length() == 37


@pytest.mark.parametrize(("config", "grows"), [(LlamaConfig(), True), (MistralConfig(), False)])
def test_only_a_cache_of_every_token_grows_in_place(config: object, grows: bool) -> None:
    assert (growing_cache(config) is not None) is grows

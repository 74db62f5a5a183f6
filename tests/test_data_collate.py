from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeft.data import TokenisedRow, collate, token_batches

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 50_000), st.booleans()), min_size=1, max_size=12).map(
        lambda tokens: TokenisedRow(
            1, [t for t, _ in tokens], [t if on else -100 for t, on in tokens]
        )
    ),
    min_size=1,
    max_size=6,
)


@given(ROWS, st.integers(0, 50_000))
@settings(max_examples=100)
def test_a_batch_holds_every_row_on_the_left_and_nothing_else(
    rows: list[TokenisedRow], pad: int
) -> None:
    batch = collate(rows, pad)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    longest = max(len(row.input_ids) for row in rows)
    for tensor in batch.values():
        assert tensor.dtype == torch.int64
        assert tensor.shape == (len(rows), longest)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        rest = longest - n
        assert batch["input_ids"][i].tolist() == row.input_ids + [pad] * rest
        assert batch["labels"][i].tolist() == row.labels + [-100] * rest
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * rest


def test_an_empty_batch_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)


@pytest.mark.parametrize("labels", [[5], [5, 6, 7]])
def test_a_row_without_one_label_for_each_token_is_a_mistake(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="line 3"):
        collate([TokenisedRow(3, [5, 6], labels)], 0)


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 100), st.randoms())
def test_token_batches_hold_every_chosen_row_once_within_the_budget(
    lengths: list[int], budget: int, draw: random.Random
) -> None:
    among = draw.sample(range(len(lengths)), draw.randint(0, len(lengths)))
    batches = token_batches(lengths, budget, among)
    together = [i for batch in batches for i in batch]
    assert together == sorted(among, key=lambda i: lengths[i])  # one length: in the order given
    assert all(len(b) * lengths[b[-1]] <= budget or len(b) == 1 for b in batches)
    for batch, following in pairwise(batches):  # no batch is cut before it is full
        assert (len(batch) + 1) * lengths[following[0]] > budget
    everything = token_batches(lengths, budget)
    assert sorted(i for batch in everything for i in batch) == list(range(len(lengths)))

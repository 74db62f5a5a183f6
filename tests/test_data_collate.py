from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeft.data import TokenisedRow, collate

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
@settings(max_examples=100, deadline=None)
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

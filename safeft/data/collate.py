"""Rows of different lengths into one rectangular batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from safeft.data.tokenise import IGNORED, TokenisedRow


def collate(rows: Sequence[TokenisedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad rows to the longest of them.

    Returns int64 tensors `input_ids`, `labels` (-100 on padding) and `attention_mask` (0 on
    padding), each (len(rows), longest). ValueError if there is no row.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        batch["input_ids"][i, :length] = torch.tensor(row.input_ids)
        batch["labels"][i, :length] = torch.tensor(row.labels)
        batch["attention_mask"][i, :length] = 1
    return batch

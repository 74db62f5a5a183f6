"""Rows of different lengths into rectangular batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def token_batches(
    lengths: Sequence[int], budget: int, among: Iterable[int] | None = None
) -> list[list[int]]:
    """Indices of rows of similar length: at most ``budget`` padded tokens a batch, or one row.

    Args:
        lengths: tokens of each row.
        among: indices of the rows to take; None: all. Rows of one length keep this order.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)) if among is None else among, key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches

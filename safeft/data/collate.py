"""Rows of different lengths into rectangular batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from safeft.data.tokenise import IGNORED, TokenisedRow

if TYPE_CHECKING:
    import torch


def collate(rows: Sequence[TokenisedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad rows to the longest of them.

    Returns int64 tensors `input_ids`, `labels` (-100 on padding) and `attention_mask` (0 on
    padding), each (len(rows), longest). ValueError if there is no row, or one with more or fewer
    labels than tokens.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    for row in rows:
        if len(row.labels) != len(row.input_ids):
            raise ValueError(f"line {row.line}: not one label for each token")
    return {
        "input_ids": pad_right([row.input_ids for row in rows], pad_token_id),
        "labels": pad_right([row.labels for row in rows], IGNORED),
        "attention_mask": pad_right([[1] * len(row.input_ids) for row in rows], 0),
    }


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of different lengths as one int64 tensor (len(rows), longest), ``value`` behind them."""
    import torch  # here: who only reads or tokenises rows waits for no torch

    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded


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

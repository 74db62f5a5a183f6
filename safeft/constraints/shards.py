"""One rank's slices of the matrices that constraints act on, and products that need all ranks.

ZeRO cuts the flattened weights into contiguous slices, in mid-row and across several layers. What
acts on the right of an update (``ΔW·U``) works row by row: whole rows need nobody, and of a split
row only the k partial products are summed. What acts on its left (``Uᵀ·ΔW``) is a sum over rows:
k × d_in numbers are summed. No weight is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankGroup:
    """The ranks among which matrices are cut.

    Attributes:
        size: how many ranks a gradient is averaged over, if each holds another slice; 1 where
            every rank holds whole matrices.
        all_reduce: sums a tensor over the ranks in place. All ranks call it alike.
    """

    size: int = 1
    all_reduce: Callable[[Tensor], None] = field(default=lambda tensor: None)


@dataclass(frozen=True)
class MatrixShard:
    """A contiguous slice of a flattened ``(rows, cols)`` matrix, as the optimizer holds it.

    Attributes:
        name: of the layer: the matrix is its W, or under LoRA its A.
        start: position of the slice's first number in the flattened matrix.
        values: ``(n,)``, a view of the fp32 master weights; n may be 0.
        boundaries: where the slices of all ranks begin, in the flattened matrix.
    """

    name: str
    rows: int
    cols: int
    start: int
    values: Tensor
    boundaries: tuple[int, ...] = ()

    @property
    def first_row(self) -> int:
        """The row that the slice begins in."""
        return self.start // self.cols

    @property
    def held_rows(self) -> slice:
        """The rows of which the slice holds something."""
        if self.values.numel() == 0:
            return slice(0, 0)
        return slice(self.first_row, (self.start + self.values.numel() - 1) // self.cols + 1)

    @property
    def has_whole_rows(self) -> bool:
        """Whether the slice begins and ends with a row."""
        return self.start % self.cols == 0 and self.values.numel() % self.cols == 0

    @property
    def split_rows(self) -> list[int]:
        """Rows that some boundary cuts: no rank holds them whole. The same on every rank."""
        inside = {b // self.cols for b in self.boundaries if b % self.cols}
        return sorted(row for row in inside if row < self.rows)

    def as_rows(self, flat: Tensor) -> Tensor:
        """A slice's numbers ``(n,)`` as its rows ``(m, cols)``, zero where another rank holds them.

        A view where the slice consists of whole rows.
        """
        if flat.numel() and not self.has_whole_rows:
            before = self.start % self.cols
            after = -(before + flat.numel()) % self.cols
            flat = torch.nn.functional.pad(flat, (before, after))
        return flat.view(-1, self.cols)

    def from_rows(self, block: Tensor) -> Tensor:
        """The slice's own numbers ``(n,)`` of its rows ``(m, cols)``."""
        before = self.start % self.cols if self.values.numel() else 0
        return block.reshape(-1)[before : before + self.values.numel()]


@dataclass(frozen=True)
class UpdateShard:
    """The update of one layer as far as this rank holds it.

    Attributes:
        shard: where it lies.
        delta: ``(m, cols)`` fp32: ``ΔW`` of the rows that the slice touches, zero outside it.
    """

    shard: MatrixShard
    delta: Tensor


class Origin:
    """W0 of one slice. Kept in bf16 where that loses nothing, as for a model stored in bf16."""

    def __init__(self, values: Tensor) -> None:
        half = values.detach().to(torch.bfloat16)
        exact = torch.equal(half.to(values.dtype), values)
        self.values = half if exact else values.detach().clone()

    def update_of(self, shard: MatrixShard) -> Tensor:
        """``ΔW`` of the slice: ``(m, cols)`` fp32."""
        return shard.as_rows(shard.values - self.values)


def right_products(
    updates: Sequence[UpdateShard], bases: Sequence[Tensor], group: RankGroup
) -> list[Tensor]:
    """``ΔW·U`` of the held rows, split rows completed by one sum over the ranks.

    Args:
        bases: U ``(cols, k)`` of each update.

    Returns:
        ``(m, k)`` for each update.
    """
    products = [u.delta @ U for u, U in zip(updates, bases, strict=True)]
    splits = [
        (u.shard, product)
        for u, product in zip(updates, products, strict=True)
        if u.shard.split_rows
    ]
    if not splits:
        return products
    sums = [product.new_zeros(len(shard.split_rows), product.shape[1]) for shard, product in splits]
    for (shard, product), total in zip(splits, sums, strict=True):
        for slot, row in _held_split_rows(shard):
            total[slot] = product[row]
    sums = summed(sums, group)
    for (shard, product), total in zip(splits, sums, strict=True):
        for slot, row in _held_split_rows(shard):
            product[row] = total[slot]
    return products


def left_products(
    updates: Sequence[UpdateShard], bases: Sequence[Tensor], group: RankGroup
) -> tuple[list[Tensor], Tensor]:
    """``Uᵀ·ΔW`` and ``‖ΔW‖_F²`` of whole layers, by one sum over the ranks.

    Args:
        bases: U ``(rows, k)`` of each update; k may be 0.

    Returns:
        ``(k, cols)`` for each update, and the squared norms ``(L,)``.
    """
    partial = [U[u.shard.held_rows].mT @ u.delta for u, U in zip(updates, bases, strict=True)]
    norms = torch.stack([u.delta.pow(2).sum() for u in updates])
    *products, norms = summed([*partial, norms], group)
    return products, norms


def summed(tensors: Sequence[Tensor], group: RankGroup) -> list[Tensor]:
    """Each tensor summed over the ranks, in one call."""
    if group.size == 1:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    group.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _held_split_rows(shard: MatrixShard) -> list[tuple[int, int]]:
    """Split rows of which this slice holds a part: (their number, their row in the block)."""
    held = shard.held_rows
    return [
        (slot, row - held.start)
        for slot, row in enumerate(shard.split_rows)
        if held.start <= row < held.stop
    ]

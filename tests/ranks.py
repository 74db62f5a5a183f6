"""Ranks as threads: collectives without processes, for the arithmetic of shards."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from safeft.constraints.shards import MatrixShard, RankGroup

T = TypeVar("T")


def on_ranks(size: int, work: Callable[[int, RankGroup], T]) -> list[T]:
    """Run ``work(rank, group)`` on every rank at once and return the results in their order."""
    barrier = threading.Barrier(size, timeout=30)
    given: list[Tensor] = [torch.zeros(0)] * size

    def group(rank: int) -> RankGroup:
        def all_reduce(tensor: Tensor) -> None:
            given[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            tensor.copy_(total)

        return RankGroup(size, all_reduce)

    def run(rank: int) -> T:
        try:
            return work(rank, group(rank))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def cut(matrices: dict[str, Tensor], cuts: list[int]) -> list[list[MatrixShard]]:
    """Matrices laid end to end and cut at ``cuts``: the shards of each rank, as ZeRO-1 and 2 cut.

    The shards' values are copies.
    """
    edges = [0, *sorted(cuts), sum(m.numel() for m in matrices.values())]
    ranks: list[list[MatrixShard]] = [[] for _ in edges[1:]]
    offset = 0
    for name, matrix in matrices.items():
        end = offset + matrix.numel()
        slices = [(max(a, offset), min(b, end)) for a, b in itertools.pairwise(edges)]
        begins = tuple(a - offset for a, b in slices if a < b)
        for rank, (a, b) in enumerate(slices):
            a, b = (a - offset, b - offset) if a < b else (0, 0)
            values = matrix.detach().reshape(-1)[a:b].clone()
            rows, cols = matrix.shape
            ranks[rank].append(MatrixShard(name, rows, cols, a, values, begins))
        offset = end
    return ranks


def whole(ranks: list[list[MatrixShard]]) -> dict[str, Tensor]:
    """The matrices that the ranks' shards hold together."""
    found: dict[str, Tensor] = {}
    for shards in zip(*ranks, strict=True):
        flat = torch.full((shards[0].rows * shards[0].cols,), float("nan"))
        for shard in shards:
            flat[shard.start : shard.start + shard.values.numel()] = shard.values
        found[shards[0].name] = flat.view(shards[0].rows, shards[0].cols)
    return found

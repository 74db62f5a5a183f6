"""The slices of the matrices that constraints act on, as views of DeepSpeed's fp32 masters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator

from jobs.finetune.masters import is_cut, master_slices
from safeft.constraints.hooks import Matrix
from safeft.constraints.shards import MatrixShard, RankGroup


def matrix_shards(
    engine: Any, matrices: Mapping[str, Matrix]
) -> tuple[list[MatrixShard], RankGroup]:
    """This rank's slice of each matrix, and the ranks that share them. All ranks call it alike.

    Call it after ``deepspeed.initialize``.

    Args:
        matrices: `ConstraintHooks.matrices`.
    """
    if not matrices:
        return [], RankGroup()
    slices = {held.parameter: held for held in master_slices(engine)}
    held = [slices[matrix.parameter] for matrix in matrices.values()]
    everybody = _exchange([(part.start, part.count) for part in held]) if is_cut(engine) else []
    shards = []
    for index, (name, matrix) in enumerate(matrices.items()):
        own = held[index]
        ranks = [tuple(ends) for ends in everybody[index]] if everybody else [(0, own.size)]
        assert sum(count for _, count in ranks) == own.size, f"{name}: slices do not tile it"
        begins = tuple(start for start, count in ranks if count)
        values = own.of(own.flat)
        shards.append(MatrixShard(name, matrix.rows, matrix.cols, own.start, values, begins))
    if not everybody:
        return shards, RankGroup()
    return shards, RankGroup(torch.distributed.get_world_size(), deepspeed.comm.all_reduce)


def _exchange(own: list[tuple[int, int]]) -> list[list[list[int]]]:
    """What every rank says of each matrix: (start, length), in the order of the ranks."""
    mine = torch.tensor(own, device=get_accelerator().current_device_name())  # (L, 2) int64
    everybody = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everybody, mine)
    rows: list[list[list[int]]] = torch.stack(everybody, dim=1).tolist()  # (L, ranks, 2)
    return rows

"""Where DeepSpeed keeps the fp32 master of each matrix that constraints act on.

Stages 1 and 2 (and bf16 without ZeRO) cut one flat buffer of all parameters into equal slices, so a
matrix may lie on one rank, on several, or not on this one. Stage 3 cuts every parameter by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor

from safeft.constraints.hooks import Matrix
from safeft.constraints.shards import MatrixShard, RankGroup


def matrix_shards(
    engine: Any, matrices: Mapping[str, Matrix]
) -> tuple[list[MatrixShard], RankGroup]:
    """This rank's slice of each matrix, as a view of the fp32 master, and the ranks that share it.

    Call it after ``deepspeed.initialize``; all ranks call it alike.

    Args:
        matrices: `ConstraintHooks.matrices`.
    """
    if not matrices:
        return [], RankGroup()
    slices = {name: _slice(engine, matrix) for name, matrix in matrices.items()}
    if not _is_cut(engine):
        return [
            MatrixShard(name, m.rows, m.cols, 0, slices[name][1]) for name, m in matrices.items()
        ], RankGroup()
    begins = _exchange([(start, values.numel()) for start, values in slices.values()])
    shards = [
        MatrixShard(
            name=name,
            rows=matrix.rows,
            cols=matrix.cols,
            start=slices[name][0],
            values=slices[name][1],
            boundaries=tuple(start for start, held in ranks if held),
        )
        for (name, matrix), ranks in zip(matrices.items(), begins, strict=True)
    ]
    for shard, ranks in zip(shards, begins, strict=True):
        held = sum(count for _, count in ranks)
        assert held == shard.rows * shard.cols, f"{shard.name}: {held} numbers on all ranks"
    return shards, RankGroup(torch.distributed.get_world_size(), torch.distributed.all_reduce)


def _is_cut(engine: Any) -> bool:
    cut: bool = engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled()
    return cut


def _slice(engine: Any, matrix: Matrix) -> tuple[int, Tensor]:
    """Where this rank's slice begins in the flattened matrix, and its fp32 numbers."""
    parameter: Any = matrix.parameter
    if engine.zero_optimization_stage() == 3:
        values: Tensor = safe_get_local_fp32_param(parameter)
        start = values.numel() * torch.distributed.get_rank()
        # The last slices are padded to the length of the others.
        return start, values[: max(0, matrix.rows * matrix.cols - start)]
    if not _is_cut(engine):
        return 0, parameter.detach().view(-1)
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.zeros(0, device=parameter.device)
    return mapping.lp_fragment_address.start, mapping.hp_fragment.detach().view(-1)


def _exchange(own: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """What every rank says of each matrix: (start, length), in the order of the ranks."""
    mine = torch.tensor(own, device=get_accelerator().current_device_name())  # (L, 2) int64
    everybody = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everybody, mine)
    rows = torch.stack(everybody, dim=1).tolist()  # (L, ranks, 2)
    return [[(start, length) for start, length in ranks] for ranks in rows]

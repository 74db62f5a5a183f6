"""The trained weights as the optimizer holds them: in fp32, in slices, on all workers.

Without ZeRO every worker holds every parameter whole. Stages 1 and 2 cut one flat buffer of all
parameters into equal slices, and stage 3 cuts each parameter by itself; both pad.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True)
class MasterSlice:
    """The part of one trained parameter that this worker's optimizer changes.

    Attributes:
        name: of the parameter in the model.
        parameter: the model's own copy, in the precision that is computed in.
        size: numbers in the whole parameter.
        start: of the slice in the flattened parameter.
        count: numbers in the slice; 0: other workers hold all of it.
        flat: the fp32 tensor that the optimizer knows, under which its state lies.
        offset: of the slice in `flat`.
    """

    name: str
    parameter: nn.Parameter
    size: int
    start: int
    count: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The slice's numbers in `flat`, or in a tensor of the optimizer's state: a 1-D view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.count]


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer gets, each parameter once (tied ones under their first name)."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, also where stage 3 has left an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_cut(engine: Any) -> bool:
    """Whether workers hold different slices, rather than everything each."""
    stage: int = engine.zero_optimization_stage()
    return stage > 0


def master_slices(engine: Any) -> list[MasterSlice]:
    """This worker's slice of every trained parameter, in the same order on every worker."""
    return [_slice(engine, name, p) for name, p in trained_parameters(engine.module.model)]


def whole_masters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Each trained parameter whole and in fp32, one after another: on rank 0 only, else zeros.

    All workers go through it together. Nobody holds more than one parameter for it.
    """
    for held in master_slices(engine):
        shape = full_shape(held.parameter)
        if not is_cut(engine):
            yield held.name, held.of(held.flat).view(shape)
            continue
        whole = torch.zeros(held.size, dtype=torch.float32, device=held.flat.device)
        whole[held.start : held.start + held.count] = held.of(held.flat)
        torch.distributed.reduce(whole, dst=0)
        yield held.name, whole.view(shape)


@torch.no_grad()
def refresh_model(engine: Any) -> None:
    """Carry masters that were changed outside a step into the weights that are computed with."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for held in master_slices(engine):
            held.parameter.copy_(held.flat.view_as(held.parameter))
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        if optimizer.persistent_parameters:  # whole copies on every worker: to be gathered again
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)


def _slice(engine: Any, name: str, parameter: Any) -> MasterSlice:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    size = full_shape(parameter).numel()
    if stage == 3:
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        start = padded * torch.distributed.get_rank()
        count = max(0, min(padded, size - start))
        return MasterSlice(name, parameter, size, start, count, flat, offset)
    if stage > 0:
        [flat] = optimizer.single_partition_of_fp32_groups
        lies = parameter._hp_mapping
        if lies is None:
            return MasterSlice(name, parameter, size, 0, 0, flat, 0)
        of_model, of_flat = lies.lp_fragment_address, lies.hp_fragment_address
        return MasterSlice(
            name, parameter, size, of_model.start, of_flat.numel, flat, of_flat.start
        )
    return MasterSlice(name, parameter, size, 0, size, _unsharded_master(engine, parameter), 0)


def _unsharded_master(engine: Any, parameter: nn.Parameter) -> Tensor:
    if not engine.bfloat16_enabled():
        return parameter
    [models], [masters] = engine.optimizer.fp16_groups, engine.optimizer.fp32_groups
    master: Tensor = next(m for p, m in zip(models, masters, strict=True) if p is parameter)
    return master

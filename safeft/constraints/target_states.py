"""How far a model's states are from stored ones, on rows that all ranks draw and share out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safeft.data import pad_right
from safeft.errors import ProfileError
from safeft.reactivation_targets import Targets
from safeft.stopped_forward import residuals_after

#: From states now and then, each a list over layers of ``(n, d)``, to ``(n,)``.
Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def mean_over_targets(
    model: nn.Module, targets: Targets, drawn: Sequence[int], measure: Measure, name: str
) -> tuple[Tensor, float]:
    """The mean of `measure` over the compared positions of the drawn rows.

    Args:
        drawn: numbers of rows, the same on all ranks.
        name: of the constraint, for errors.

    Returns:
        This rank's share, whose mean over the ranks is the value, differentiable; and the value.

    Raises:
        ProfileError: the model's states are not as wide as the stored ones.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = drawn[rank::ranks]
    # A rank without a row reads one all the same: under ZeRO-3 all ranks gather together.
    now, then = _states(model, targets, own or drawn[:1], name)
    positions = sum(len(targets.states[index]) for index in drawn)
    mean = measure(now, then).sum() * ((ranks if own else 0.0) / positions)
    total = mean.detach().clone()
    if ranks > 1:
        dist.all_reduce(total)
        total /= ranks
    return mean, float(total)


def _states(
    model: nn.Module, targets: Targets, chosen: Sequence[int], name: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The states at the rows' compared positions, now and stored: a ``(n, d)`` for each layer."""
    device = next(model.parameters()).device
    rows = [targets.rows[index] for index in chosen]
    ids = pad_right(rows, 0)
    states = [targets.states[index] for index in chosen]
    now = residuals_after(model, targets.layers, ids.to(device))
    width, expected = now[0].shape[-1], states[0].shape[-1]
    if width != expected:
        raise ProfileError(
            f"{name}: the reference's states have {expected} numbers, the model's {width}: "
            "the profile belongs to another model"
        )
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    for number, (row, found) in enumerate(zip(rows, states, strict=True)):
        counted[number, len(row) - len(found) : len(row)] = True
    # Both in the order of rows and positions.
    return [h[counted.to(device)] for h in now], list(torch.cat(states).to(device).unbind(1))

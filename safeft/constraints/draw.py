"""Which prompts a step reads: a pure function, so that all ranks and a resumed run draw alike."""

from __future__ import annotations

import torch


def draw(step: int, batch: int, count: int) -> list[int]:
    """Numbers below `count` for the 0-based `step`: each once before any comes again."""
    batch = min(batch, count)
    chosen = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(index, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        chosen.append(int(order[place]))
    return chosen

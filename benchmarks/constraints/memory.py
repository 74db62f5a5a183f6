"""What a constrained run holds between two steps beyond a plain one."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.constraints.steps import Step

_MIB = 2**20


def live_mib() -> float:
    """Memory of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, Tensor) and found.device.type != "meta":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / _MIB


def held_by(build: Callable[[], Step]) -> tuple[float, str]:
    """MiB that a step leaves behind after two calls, and what its constraints say they hold."""
    before = live_mib()
    step = build()
    step()
    step()
    after = live_mib()
    bases = [U for c in step.constraints for U in c.update_bases().values()]
    anchors = [a.U for c in step.constraints for a in c.anchors().values()]
    origins = [origin.values for origin in step.hooks.origins.values()]
    parts = {"W0": origins, "U": [*bases, *anchors]}
    said = ", ".join(f"{name} {_mib(tensors):.0f}" for name, tensors in parts.items())
    return after - before, said


def _mib(tensors: list[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / _MIB


def device_note() -> str:
    """For the table: which machine."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, fp32"

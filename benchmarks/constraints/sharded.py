"""Steps under ZeRO-3 on two ranks, with every byte that they communicate counted."""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from benchmarks.constraints.steps import Shape, Step
from benchmarks.constraints.timing import interleaved, ratio
from jobs.spec import DataSpec, DistributedSpec, FinetuneSpec, TrainingSpec
from safeft.constraints import (
    AsftConfig,
    ConstraintConfig,
    ConstraintHooks,
    CwacConfig,
    ProfileFiles,
)
from safeft.progress import Progress

RANKS = 2
#: Every constraint on every linear layer: the most that there is to do.
WORST: tuple[ConstraintConfig, ...] = (
    AsftConfig(),
    CwacConfig(positions="prompt", rank=32, contrast=None),
)


def zero3(
    model_dir: Path,
    files: ProfileFiles,
    quick: bool,
    add: Callable[[str, float, str], None],
    progress: Progress,
) -> None:
    """The worst constraint's ratio under ZeRO-3 ÷ its ratio unsharded, and bytes ÷ plain bytes."""
    repeats = 3 if quick else 5
    shape = Shape(rows=2, tokens=128, labels=32) if quick else Shape(rows=4, tokens=256, labels=64)
    constrained = Step(
        model_dir, lora=False, constraints=[c.build(files) for c in WORST], shape=shape
    )
    plain = Step(model_dir, lora=False, constraints=[], shape=shape)
    unsharded = ratio(
        interleaved(constrained, plain, repeats, "unsharded, both constraints", progress)
    )
    del constrained, plain
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "rank0.json"
        progress("ZeRO-3, two ranks", 0, None)
        torch.multiprocessing.spawn(
            _rank, args=(_free_port(), model_dir, files, shape, repeats, out), nprocs=RANKS
        )
        found = json.loads(out.read_text())
    sharded = statistics.median(
        a / b for a, b in zip(found["constrained"], found["plain"], strict=True)
    )
    add(
        "zero3_step",
        sharded / unsharded,
        f"constrained / plain: {sharded:.3f} under ZeRO-3 on {RANKS} ranks, "
        f"{unsharded:.3f} unsharded; AsFT and CWAC (k <= 32) on all linear layers",
    )
    more, less = found["bytes_constrained"], found["bytes_plain"]
    add("zero3_bytes", more / less, f"{more / 2**20:.1f} against {less / 2**20:.1f} MiB a step")


def _rank(
    rank: int,
    port: int,
    model_dir: Path,
    files: ProfileFiles,
    shape: Shape,
    repeats: int,
    out: Path,
) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    counter = _Counter()  # before DeepSpeed, which keeps functions of torch.distributed
    from jobs.finetune.engine import join_process_group

    join_process_group(use_gpu=False)
    steps = {
        name: _engine_step(model_dir, files, constraints, shape)
        for name, constraints in {"constrained": WORST, "plain": ()}.items()
    }
    found: dict[str, Any] = {name: [] for name in steps}
    for name, step in steps.items():
        step()
        counter.total = 0
        step()
        found[f"bytes_{name}"] = counter.total
    for repeat in range(repeats):
        order = list(steps) if repeat % 2 else list(steps)[::-1]
        for name in order:
            torch.distributed.barrier()
            started = time.perf_counter()
            steps[name]()
            torch.distributed.barrier()
            found[name].append(time.perf_counter() - started)
    if rank == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _engine_step(
    model_dir: Path,
    files: ProfileFiles,
    constraints: tuple[ConstraintConfig, ...],
    shape: Shape,
) -> Callable[[], None]:
    """One training step as a worker of `safeft finetune` makes it."""
    from jobs.finetune.engine import build_engine
    from jobs.finetune.model import load_trained_model, trained_layers
    from jobs.finetune.shards import matrix_shards

    spec = FinetuneSpec(
        name="benchmark",
        model=str(model_dir),
        data=DataSpec(train=Path("unused.jsonl")),
        lora=None,
        training=TrainingSpec(batch_size=shape.rows),
        distributed=DistributedSpec(workers=RANKS, zero_stage=3),
        output=Path("unused"),
    )
    model = load_trained_model(spec, model_dir)
    layers = trained_layers(spec, model)
    hooks = ConstraintHooks([c.build(files) for c in constraints], layers)
    engine = build_engine(spec, model, hooks)
    hooks.attach(*matrix_shards(engine, hooks.matrices()))
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-5
    ids = torch.randint(3, 49152, (shape.rows // RANKS, shape.tokens))
    labels = torch.full_like(ids, -100)
    labels[:, -shape.labels :] = ids[:, -shape.labels :]
    weight = RANKS / (shape.rows * shape.labels)

    def step() -> None:
        hooks.before_backward(1)
        loss, _ = engine(ids, labels, weight, (0, 1.0))
        engine.backward(loss)
        engine.step()
        hooks.after_step()
        hooks.metrics()

    return step


class _Counter:
    """Bytes that pass through torch.distributed's collectives on this rank: their outputs."""

    NAMES = (
        "all_reduce",
        "all_gather_into_tensor",
        "all_gather",
        "reduce_scatter_tensor",
        "reduce_scatter",
        "broadcast",
        "reduce",
        "_all_gather_base",
        "_reduce_scatter_base",
    )

    def __init__(self) -> None:
        self.total = 0
        for name in self.NAMES:
            if hasattr(torch.distributed, name):
                setattr(torch.distributed, name, self._counted(getattr(torch.distributed, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
            for listed in [a for a in args if isinstance(a, list)]:
                tensors += [t for t in listed if isinstance(t, torch.Tensor)]
            # The largest is what the collective moves: the whole of what is gathered or scattered.
            self.total += max((t.numel() * t.element_size() for t in tensors), default=0)
            return real(*args, **kwargs)

        return call


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port

"""The training loop on processes of its own, without Ray: many engines in one start.

``python -m tests.tinyranks RANK WORLD MODEL WHERE WORK...`` is one rank. WORK is any of

- ``train``: every case to the end; the state after `HALF` steps and the end go to WHERE;
- ``resume``: every case to the end from the state that another number of ranks left there;
- ``edit``: a step whose outcome the hooks edit, under every stage and precision;
- ``diverge``: a loss that is not finite, under every stage;
- ``restore``: a restoration under every stage.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor

from jobs.finetune.batches import RowTable, batch_plan, rows_to_table
from jobs.finetune.engine import build_engine, join_process_group
from jobs.finetune.export import adapter_factors, model_tensors
from jobs.finetune.masters import master_slices, whole_masters
from jobs.finetune.model import load_trained_model, trained_layers
from jobs.finetune.state import load_state, save_state
from jobs.finetune.worker import _Loop
from safeft.constraints import ConstraintHooks
from safeft.constraints.reactivation import Reactivation
from safeft.errors import TrainingError
from tests.tinyjob import make_rows, make_spec
from tests.tinyreactivation import restore_spec, retained_rows, some_targets

HALF = 5  # in mid-epoch
LORA = {"rank": 4, "alpha": 16}
STAGES = (0, 1, 2, 3)
CASES = [(kind, stage) for kind in ("model", "adapter") for stage in STAGES]


def start_ranks(world: int, model_dir: Path, where: Path, *work: str) -> None:
    """Run all ranks to their end."""
    where.mkdir(exist_ok=True)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    (where / "group").unlink(missing_ok=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.tinyranks"]
            + [str(argument) for argument in (rank, world, model_dir, where, *work)],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


class Edit:
    """Stands for the constraints: halves the masters after each step."""

    engine: Any

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []  # the masters' slices, each time before they are halved

    def project(self) -> None:
        own = [held.of(held.flat) for held in master_slices(self.engine)]
        self.seen.append([numbers.clone() for numbers in own])
        for numbers in own:
            numbers.mul_(0.5)

    def forward_loss(self, model: Any, step: int) -> None:
        return None

    def before_backward(self, accumulation_steps: int) -> dict[str, float]:
        return {}

    def retained_layers(self) -> tuple[int, ...]:
        return ()

    def row_weight(self, step: int) -> float:
        return 1.0

    def after_step(self) -> None:
        pass

    def metrics(self, thorough: bool = False) -> dict[str, float]:
        return {}


class Run:
    """One case on this rank, up to its first step."""

    def __init__(
        self, kind: str, stage: int, model_dir: Path, hooks: Any = None, **training: Any
    ) -> None:
        spec = make_spec(
            Path("out"),
            constraints=[],
            lora=LORA if kind == "adapter" else None,
            training={
                "micro_batch_size": 2,
                "gradient_checkpointing": stage >= 2,
                **training,
            },
            distributed={"zero_stage": stage, "workers": torch.distributed.get_world_size()},
        )
        model = load_trained_model(spec, model_dir)
        self.layers = trained_layers(spec, model)
        hooks = hooks or ConstraintHooks([], self.layers)
        self.engine = build_engine(spec, model, hooks)
        table = RowTable(rows_to_table(make_rows()))
        self.plan, rank = batch_plan(spec, table), torch.distributed.get_rank()
        self.loop = _Loop(spec, self.engine, self.layers, hooks, table, self.plan, rank)

    def losses(self, begin: int, end: int) -> list[float]:
        return [self.loop.step(step)["loss"] for step in range(begin, end)]

    def finish(self, file: Path, losses: list[float], model_dir: Path) -> None:
        """Write the end of the run: the weights and the losses."""
        if self.loop.spec.lora is None:
            tensors = model_tensors(self.engine, model_dir)
        else:
            factors = adapter_factors(self.engine, self.layers).factors
            tensors = {
                f"base_model.model.{name}.lora_{letter}.weight": factor
                for name, pair in factors.items()
                for letter, factor in zip("AB", pair, strict=True)
            }
        assert bool(tensors) == (torch.distributed.get_rank() == 0)
        if tensors:
            save_file(tensors, file, metadata={"losses": json.dumps(losses)})


def train(model_dir: Path, where: Path) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for kind, stage in CASES:
        run = Run(kind, stage, model_dir)
        losses = run.losses(0, HALF)
        state = where / f"state-{kind}-{stage}-{world}"
        state.mkdir(exist_ok=True)
        save_state(run.engine, state, rank)
        losses += run.losses(HALF, run.plan.total_steps)
        run.finish(where / f"{kind}-{stage}-{world}.safetensors", losses, model_dir)


def resume(model_dir: Path, where: Path) -> None:
    world = torch.distributed.get_world_size()
    for kind, stage in CASES:
        run = Run(kind, stage, model_dir)
        load_state(run.engine, where / f"state-{kind}-{stage}-{3 - world}")
        losses = run.losses(HALF, run.plan.total_steps)
        name = f"{kind}-{stage}-{3 - world}-{world}.safetensors"
        run.finish(where / name, losses, model_dir)


def edit(model_dir: Path, where: Path) -> None:
    for stage, precision in itertools.product(STAGES, ("fp32", "bf16")):
        case, hooks = (stage, precision), Edit()
        run = Run("model", stage, model_dir, hooks, precision=precision)
        hooks.engine = run.engine
        before = [held.of(held.flat).clone() for held in master_slices(run.engine)]
        run.losses(0, 1)
        [seen] = hooks.seen  # once, and not by the step that DeepSpeed makes for itself
        for held, was, after_adam in zip(master_slices(run.engine), before, seen, strict=True):
            assert held.flat.dtype == torch.float32, case
            assert held.count == 0 or not torch.equal(after_adam, was), (case, held.name)
            assert torch.equal(held.of(held.flat), after_adam * 0.5), (case, held.name)
        parameters = dict(run.engine.module.model.named_parameters())
        for name, master in whole_masters(run.engine):
            copy = parameters[name]
            with deepspeed.zero.GatheredParameters([copy], enabled=stage == 3):
                if torch.distributed.get_rank() == 0:
                    assert torch.equal(copy, master.to(copy.dtype)), (case, name)


def diverge(model_dir: Path, where: Path) -> None:
    """Before it can spoil the weights, the step is named on every rank: none waits for another."""
    for stage in STAGES:
        run = Run("adapter", stage, model_dir, learning_rate=1e30, warmup_ratio=0.0)
        told = ""
        try:
            run.losses(0, 2)
        except TrainingError as error:
            told = str(error)
        assert re.match(r"step 2: the loss is (nan|inf); lower", told), (stage, told)


def restore(model_dir: Path, where: Path) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for stage in STAGES:
        spec = restore_spec(zero_stage=stage, workers=world)
        layers = trained_layers(spec, model := load_trained_model(spec, model_dir))
        hooks = ConstraintHooks([Reactivation(spec.constraints[0], some_targets())], layers)
        engine = build_engine(spec, model, hooks)
        table = RowTable(rows_to_table(retained_rows()))
        loop = _Loop(spec, engine, layers, hooks, table, batch_plan(spec, table), rank)
        losses = [loop.step(step)["loss"] for step in range(loop.plan.total_steps)]
        factors = adapter_factors(engine, layers).factors
        if rank == 0:
            tensors = {
                f"{name}.{letter}": factor
                for name, pair in factors.items()
                for letter, factor in zip("AB", pair, strict=True)
            }
            file = where / f"restore-{stage}-{world}.safetensors"
            save_file(tensors, file, metadata={"losses": json.dumps(losses)})


WORK = {"train": train, "resume": resume, "edit": edit, "diverge": diverge, "restore": restore}


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    model_dir, where = Path(sys.argv[3]), Path(sys.argv[4])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{where}/group", rank=rank, world_size=world
    )
    join_process_group(use_gpu=False)
    for name in sys.argv[5:]:
        WORK[name](model_dir, where)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

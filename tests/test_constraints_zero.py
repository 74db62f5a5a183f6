"""All constraints together under DeepSpeed on several ranks, against one plain process.

One group of processes runs every stage, with LoRA and with whole weights; each case trains the tiny
model with clipping, accumulation and both constraints, and writes what it ended with.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.spec import DataSpec, DistributedSpec, FinetuneSpec, LoraSpec, TrainingSpec
from safeft.constraints import (
    Asft,
    AsftConfig,
    ConstraintHooks,
    Cwac,
    CwacConfig,
    HeldStates,
    HeldStatesConfig,
)
from safeft.constraints.activation import ActivationPenalty
from safeft.latents import ActivationTargets
from safeft.reactivation_targets import Targets
from safeft.sae import TopKAutoencoder
from safeft.weights import TrainedLayers, full_weights
from tests.test_constraints import direction_of
from tests.test_cwac import Subspaces
from tests.tiny import save_tiny, tiny_model

STEPS, ROWS, RANKS = 4, 6, 3
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """One run: 3 ranks, or the plain loop (stage None)."""

    stage: int | None
    lora: bool
    precision: str = "fp32"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        kind = "lora" if self.lora else "full"
        return f"{kind}-{self.stage}-{self.precision}-{self.checkpointing}"


SHARDED = [Case(stage, lora) for lora in (False, True) for stage in (0, 1, 2, 3)]
OTHERS = [
    Case(2, False, checkpointing=True),
    Case(3, False, checkpointing=True),
    *(Case(stage, False, "bf16") for stage in (0, 1, 2, 3)),
    Case(2, True, "bf16"),
]
PLAIN = [Case(None, lora) for lora in (False, True)]


def spec_of(case: Case, model_dir: Path) -> FinetuneSpec:
    return FinetuneSpec(
        name="zero",
        model=str(model_dir),
        data=DataSpec(train=Path("none.jsonl")),
        lora=LoraSpec(rank=4, target_modules=("q_proj", "down_proj")) if case.lora else None,
        training=TrainingSpec(
            batch_size=ROWS,
            micro_batch_size=1,
            max_grad_norm=0.5,
            adam_eps=1e-4,
            precision=case.precision,  # type: ignore[arg-type]
            gradient_checkpointing=case.checkpointing,
        ),
        distributed=DistributedSpec(workers=RANKS, zero_stage=case.stage or 0),  # type: ignore[arg-type]
        output=Path("none"),
    )


def constraints_on(layers: TrainedLayers) -> list[Any]:
    """AsFT on all layers, CWAC's projection on all, and both terms on activations."""
    subspaces = SimpleNamespace(basis=lambda name, *_: bases()[name])
    torch.manual_seed(5)
    directions = {
        name: direction_of(torch.randn(x.d_out, 3) @ torch.randn(3, x.d_in) * 0.1)
        for name, x in layers.items()
    }
    activation = ActivationPenalty(targets(), lam=0.5, batch=2)  # one rank of three has none
    config = CwacConfig(mode="both")
    cwac = Cwac(config, subspaces, activation)  # type: ignore[arg-type]
    held = HeldStates(HeldStatesConfig(lam=2.0, batch=2), held_states())
    return [Asft(AsftConfig(lam=0.5), directions), cwac, held]


def held_states() -> Targets:
    torch.manual_seed(10)
    rows = [[5, 6, 7, 8, 9], [9, 8, 7], [11, 12, 13, 14]]
    return Targets("none", (0, 1), rows, [torch.randn(n, 2, 32) for n in (3, 2, 4)])


def targets() -> ActivationTargets:
    torch.manual_seed(9)
    W = torch.randn(48, 32)
    autoencoder = TopKAutoencoder(W, torch.zeros(48), W.T.contiguous(), torch.zeros(32), 12, 0)
    return ActivationTargets(
        base_weights="none",
        autoencoder=autoencoder,
        latents=torch.arange(0, 48, 4),
        prompts=[[5, 6, 7, 8, 9], [9, 8, 7], [11, 12, 13, 14]],
        baseline=torch.rand(3, 2, 12),
        positions=2,
    )


def batch(step: int) -> Tensor:
    return torch.randint(3, 200, (ROWS, 10), generator=torch.Generator().manual_seed(step))


def run_plain(case: Case, model_dir: Path) -> dict[str, Tensor]:
    from jobs.finetune.loss import LabelLoss
    from jobs.finetune.model import load_trained_model, trained_layers

    spec = spec_of(case, model_dir)
    model: Any = load_trained_model(spec, model_dir)
    layers = trained_layers(spec, model)
    hooks = ConstraintHooks(constraints_on(layers), layers)
    start = snapshot(model)
    wrapped = LabelLoss(model, hooks.forward_loss).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4, weight_decay=0.0)
    found = {}
    for step in range(STEPS):
        penalties = hooks.before_backward(1)
        loss, _ = wrapped(batch(step), batch(step), 1 / (ROWS * 9), (step, 1.0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        hooks.after_step()
        found[f"penalties/{step}"] = torch.tensor([penalties["asft"], *activation_of(hooks)])
    return {**{n: p - start[n] for n, p in snapshot(model).items()}, **found}


def snapshot(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}


def activation_of(hooks: ConstraintHooks) -> list[float]:
    metrics = hooks.metrics()
    return [
        metrics["penalty/cwac"],
        metrics["cwac/latent_drift"],
        metrics["penalty/held_states"],
    ]


def run_rank(rank: int, port: int, model_dir: Path, out: Path) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    from jobs.finetune.engine import join_process_group

    join_process_group(use_gpu=False)
    for case in [*SHARDED, *OTHERS]:
        found = run_case(case, model_dir, rank)
        if rank == 0:
            save_file(found, out / f"{case.name}.safetensors")
    torch.distributed.destroy_process_group()


def run_case(case: Case, model_dir: Path, rank: int) -> dict[str, Tensor]:
    from jobs.finetune.engine import build_engine, whole_factors
    from jobs.finetune.masters import whole_masters
    from jobs.finetune.model import load_trained_model, trained_layers
    from jobs.finetune.shards import matrix_shards

    spec = spec_of(case, model_dir)
    model: Any = load_trained_model(spec, model_dir)
    layers = trained_layers(spec, model)
    hooks = ConstraintHooks(constraints_on(layers), layers)
    engine = build_engine(spec, model, hooks)
    hooks.attach(*matrix_shards(engine, hooks.matrices()))
    start = {n: p.clone() for n, p in whole_masters(engine)}
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3
    found = {}
    weight = RANKS * 2 / (ROWS * 9)
    for step in range(STEPS):
        with whole_factors(layers):
            penalties = hooks.before_backward(2)
        for micro in range(2):
            ids = batch(step)[2 * rank + micro][None]
            loss, _ = engine(ids, ids, weight, (step, 2.0) if micro == 0 else None)
            engine.backward(loss)
            engine.step()
        hooks.after_step()
        found[f"penalties/{step}"] = torch.tensor([penalties["asft"], *activation_of(hooks)])
        drift = hooks.metrics(thorough=True)
        found[f"drift/{step}"] = torch.tensor(drift.get("cwac/weight_drift", 0.0))
    ended = {n: p.clone() for n, p in whole_masters(engine)}
    copies = model_copies(engine)
    if case.lora:
        found |= {f"master/{n}": p for n, p in ended.items() if "lora_A" in n}
    different = {f"copy/{n}": (p - ended[n]).abs().max() for n, p in copies.items()}
    return {**{n: p - start[n] for n, p in ended.items()}, **found, **different}


def model_copies(engine: Any) -> dict[str, Tensor]:
    """The weights that the next forward pass computes with."""
    import deepspeed

    named = [(n, p) for n, p in engine.module.model.named_parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(
        [p for _, p in named], enabled=engine.zero_optimization_stage() == 3
    ):
        return {n: p.detach().float().clone() for n, p in named}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("zero")
    model_dir = save_tiny(directory / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(port, model_dir, directory), nprocs=RANKS)
    found = {case.name: run_plain(case, model_dir) for case in PLAIN}
    for case in [*SHARDED, *OTHERS]:
        found[case.name] = load_file(directory / f"{case.name}.safetensors")
    return found


def weights_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        n: t
        for n, t in found.items()
        if not n.startswith(("penalties/", "drift/", "copy/", "master/"))
    }


@pytest.mark.parametrize("case", [*SHARDED, *OTHERS[:2]], ids=lambda case: case.name)
def test_every_stage_ends_where_the_plain_loop_does(
    case: Case, results: dict[str, dict[str, Tensor]]
) -> None:
    plain, sharded = results[Case(None, case.lora).name], results[case.name]
    moved = weights_of(plain)
    assert moved.keys() == weights_of(sharded).keys()
    assert max(float(t.abs().max()) for t in moved.values()) > 1e-3
    for name, expected in moved.items():
        assert (sharded[name] - expected).abs().max() <= 1e-5, name
    for step in range(STEPS):
        key = f"penalties/{step}"
        assert torch.allclose(sharded[key], plain[key], rtol=1e-4), key


@pytest.mark.parametrize("case", [*SHARDED, *OTHERS], ids=lambda case: case.name)
def test_the_update_stays_outside_the_harmful_inputs_under_every_stage(
    case: Case, results: dict[str, dict[str, Tensor]]
) -> None:
    found = results[case.name]
    # The metric is of what the model computes with: bf16 rounds the projected LoRA factors.
    rounding = 2**-8 if case.lora and case.precision == "bf16" else 1e-5
    assert max(float(found[f"drift/{step}"]) for step in range(STEPS)) < rounding
    checked = 0
    for name, U in bases().items():
        if case.lora:
            A = found.get(f"master/base_model.model.{name}.lora_A.default.weight")
            if A is None:
                continue
            assert (A.double() @ U.double()).norm() <= 1e-5 * A.norm(), name
        else:
            delta = found[f"{name}.weight"].double()
            # The second term is the rounding of W, whose numbers are about 0.02.
            bound = 1e-5 * delta.norm() + 4 * EPS * 0.02 * delta.numel() ** 0.5
            assert (delta @ U.double()).norm() <= bound, name
        checked += 1
    assert checked == (4 if case.lora else 14)


@cache
def bases() -> dict[str, Tensor]:
    return Subspaces(full_weights(tiny_model()), k=7).U


@pytest.mark.parametrize("case", [*SHARDED, *OTHERS], ids=lambda case: case.name)
def test_the_model_computes_with_the_projected_masters(
    case: Case, results: dict[str, dict[str, Tensor]]
) -> None:
    rounding = 2**-8 if case.precision == "bf16" else 0.0
    for name, value in results[case.name].items():
        if name.startswith("copy/"):
            assert float(value) <= rounding, name

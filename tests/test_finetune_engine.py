"""DeepSpeed in processes of its own, without Ray: what the loop relies on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import save_tiny
from tests.tinyjob import plain_full_loop, plain_loop
from tests.tinyranks import CASES, HALF, STAGES, start_ranks

Plain = tuple[dict[str, Tensor], list[float]]

SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from jobs.finetune.engine import build_engine, join_process_group
from jobs.finetune.model import load_trained_model, trained_layers
from safeft.constraints import ConstraintHooks
from safeft.data import collate
from tests.tinyjob import make_rows, make_spec
join_process_group(use_gpu=False)
spec = make_spec(
    Path("out"),
    training={"precision": "bf16", "adam_eps": 1e-12, "max_grad_norm": None},
    distributed={"zero_stage": 0},
)
model = load_trained_model(spec, Path(sys.argv[1]))
pairs = trained_layers(spec, model)
engine = build_engine(spec, model, ConstraintHooks([], pairs))
for group in engine.optimizer.param_groups:
    group["lr"] = 0.25
batch = collate(make_rows()[:8], 0)
engine.backward(engine(batch["input_ids"], batch["labels"])[0])
engine.step()
for name, pair in pairs.items():
    moved = pair.B.detach().float().abs()
    assert ((moved - 0.25).abs() < 1e-3).float().mean() > 0.99, (name, moved.mean())
print("each entry moved by one learning rate")
"""


def test_adams_first_step_in_bf16_is_one_learning_rate_long(tiny_dir: Path) -> None:
    """DeepSpeed allocates Adam's state with a step of its own, which must not count."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_dir)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "each entry moved by one learning rate" in done.stdout, done.stderr[-2000:]


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every case left: trained by 1 rank and by 2, and resumed by the other number."""
    where = tmp_path_factory.mktemp("ranks") / "cases"
    start_ranks(2, tiny_dir, where, "train")
    start_ranks(1, tiny_dir, where, "train", "resume")
    start_ranks(2, tiny_dir, where, "resume")
    return where


@pytest.fixture(scope="module")
def plain(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plain]:
    other = save_tiny(tmp_path_factory.mktemp("other"), seed=1)
    return {"model": plain_full_loop(tiny_dir), "adapter": plain_loop(tiny_dir, other, lam=0.0)}


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_any_stage_and_number_of_ranks_ends_where_a_plain_loop_does_also_when_it_changes(
    kind: str, stage: int, trained: Path, plain: dict[str, Plain]
) -> None:
    weights, losses = plain[kind]
    for ranks, since in (("1", 0), ("2", 0), ("1-2", HALF), ("2-1", HALF)):
        file = trained / f"{kind}-{stage}-{ranks}.safetensors"
        found = load_file(file)
        assert found.keys() == weights.keys()
        worst = max(float((found[name] - weights[name]).abs().max()) for name in found)
        assert worst < 1e-5, (ranks, worst)
        with safe_open(file, framework="pt") as opened:
            said = json.loads(opened.metadata()["losses"])
        assert said == pytest.approx(losses[since:], abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_the_state_on_disk_is_three_numbers_for_each_trained_one(
    stage: int, world: int, trained: Path, plain: dict[str, Plain]
) -> None:
    for kind in ("model", "adapter"):
        directory = trained / f"state-{kind}-{stage}-{world}"
        stored = [load_file(file) for file in directory.iterdir()]
        count = sum(tensor.numel() for tensors in stored for tensor in tensors.values())
        assert count == 3 * sum(weight.numel() for weight in plain[kind][0].values())
        assert all(t.dtype == torch.float32 for tensors in stored for t in tensors.values())


def test_what_hooks_make_of_a_step_is_what_the_model_gets_and_a_loss_that_is_nan_ends_it(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """Under every stage, the former in fp32 and in bf16: see `tests.tinyranks`."""
    start_ranks(2, tiny_dir, tmp_path / "steps", "edit", "diverge")

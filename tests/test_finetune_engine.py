"""DeepSpeed in a process of its own, without Ray: what the loop relies on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from jobs.finetune.engine import build_engine, join_process_group, load_lora_model
from safeft.data import collate
from safeft.lora import lora_pairs
from tests.tinyjob import make_rows, make_spec
join_process_group(use_gpu=False)
spec = make_spec(
    Path("out"),
    training={"precision": "bf16", "adam_eps": 1e-12, "max_grad_norm": None},
    distributed={"zero_stage": 0},
)
model = load_lora_model(spec, Path(sys.argv[1]))
pairs = lora_pairs(model)
before = {n: p.A.detach().float().clone() for n, p in pairs.items()}
engine = build_engine(spec, model, pairs)
for group in engine.optimizer.param_groups:
    group["lr"] = 0.25
batch = collate(make_rows()[:8], 0)
engine.backward(engine(batch["input_ids"], batch["labels"]))
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

"""A small fine-tuning job, and the same job as a plain loop that shares no code with it.

``python -m tests.tinyjob MODEL OUTPUT`` runs a `LONG` `full_spec` with two workers.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from jobs.finetune import FinetuneResult, finetune
from jobs.spec import FinetuneSpec
from safeft.constraints import ProfileFiles
from safeft.data import TokenisedRow, collate
from safeft.lora import lora_pairs
from safeft.models import load_model
from safeft.progress import Progress, silent

ROWS = 17  # in batches of 8: the last step of an epoch has one row, for two workers
EPOCHS = 3
LONG = 15  # epochs of a run that has to be caught in its middle from outside
LAM = 40.0
MARK = "SAFEFT_TEST_MARK"  # in the environment of every process that a test starts


def make_rows() -> list[TokenisedRow]:
    draw = random.Random(3)
    rows = []
    for line in range(1, ROWS + 1):
        ids = [draw.randint(3, 250) for _ in range(draw.randint(6, 24))]
        prompt = draw.randint(1, len(ids) - 2)
        rows.append(TokenisedRow(line, ids, [-100] * prompt + ids[prompt:]))
    return rows


def make_spec(
    output: Path, *, training: dict[str, Any] | None = None, **parts: Any
) -> FinetuneSpec:
    content = {
        "name": "tiny",
        "model": "./tiny",
        "data": {"train": "rows.jsonl"},
        "lora": {"rank": 4, "alpha": 16},
        "constraints": [{"kind": "asft", "lam": LAM}],
        "output": str(output),
        **parts,
    }
    content["training"] = {
        "epochs": EPOCHS,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "warmup_ratio": 0.2,
        "weight_decay": 0.01,
        "adam_eps": 1e-4,  # at 1e-8 Adam turns the rounding of tiny gradients into whole steps
        "max_grad_norm": 0.2,
        "checkpoint_every": 2,
        **(training or {}),
    }
    return FinetuneSpec.model_validate(content)


def full_spec(output: Path, *, epochs: int = EPOCHS, **distributed: Any) -> FinetuneSpec:
    """Every weight trained, with all that could get in the way."""
    training = {"epochs": epochs, "micro_batch_size": 2, "gradient_checkpointing": True}
    return make_spec(output, lora=None, constraints=[], training=training, distributed=distributed)


def run(
    spec: FinetuneSpec, model_dir: Path, directions: Path | None = None, progress: Progress = silent
) -> FinetuneResult:
    return finetune(
        spec,
        rows=make_rows(),
        model_dir=model_dir,
        profile=ProfileFiles(alignment=directions),
        output=spec.output,
        progress=progress,
    )


def plain_loop(
    model_dir: Path, unaligned_dir: Path, lam: float = LAM
) -> tuple[dict[str, Tensor], list[float]]:
    """One process, whole batches, dense penalty by autograd: the adapter and each step's loss."""
    base = load_model(model_dir)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).train()
    pairs = lora_pairs(model)
    unaligned = load_file(unaligned_dir / "model.safetensors")
    C = {}
    for name in pairs:
        W = base.get_submodule(name).get_base_layer().weight.detach().double()
        V = W - unaligned[f"{name}.weight"].double()
        C[name] = V @ V.T / V.pow(2).sum().sqrt()

    def penalty() -> Tensor:
        terms = [
            ((torch.eye(p.d_out) - C[n]) @ (p.B.double() @ p.A.double())).pow(2).sum()
            for n, p in pairs.items()
        ]
        return lam * torch.stack(terms).sum()

    losses = _train(model, penalty)
    adapter = {
        f"base_model.model.{name}.lora_{letter}.weight": factor.detach().clone()
        for name, pair in pairs.items()
        for letter, factor in (("A", pair.A), ("B", pair.B))
    }
    return adapter, losses


def plain_full_loop(model_dir: Path, epochs: int = EPOCHS) -> tuple[dict[str, Tensor], list[float]]:
    """The same with every weight trained and no penalty: all weights and each step's loss."""
    model = load_model(model_dir).train()
    losses = _train(model, lambda: torch.zeros(()), epochs)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, losses


def _train(model: Any, penalty: Callable[[], Tensor], epochs: int = EPOCHS) -> list[float]:
    rows = make_rows()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, eps=1e-4, weight_decay=0.01)
    per_epoch = math.ceil(ROWS / 8)
    total, losses = epochs * per_epoch, []
    warmup = math.ceil(0.2 * total)
    for step in range(total):
        epoch, within = divmod(step, per_epoch)
        order = np.random.default_rng([0, epoch]).permutation(ROWS)
        batch = collate([rows[i] for i in order[within * 8 : within * 8 + 8]], 0)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        losses.append(loss.item())
        (loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.2)
        rate = (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (total - warmup)
        optimizer.param_groups[0]["lr"] = 2e-3 * rate
        optimizer.step()
        optimizer.zero_grad()
    return losses


def processes(name: bytes = b"", mark: str | None = None) -> list[int]:
    """Processes started under a MARK (this process's one) with `name` in their command line."""
    wanted = f"{MARK}={mark or os.environ[MARK]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment, command = (
                (entry / "environ").read_bytes(),
                (entry / "cmdline").read_bytes(),
            )
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is not ours
        if wanted in environment and name in command:
            found.append(int(entry.name))
    return sorted(found)


if __name__ == "__main__":
    # Whoever runs the tests in the background may have let them ignore what Ctrl-C sends.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = full_spec(Path(sys.argv[2]), epochs=LONG, workers=2, zero_stage=2)
    run(spec, Path(sys.argv[1]))

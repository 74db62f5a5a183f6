"""A tiny tuned model to restore, and SafeReAct's loss written from the paper's formula alone.

The oracle runs one row at a time in fp64, pads nothing, reads ``hidden_states`` of the full
forward pass, and takes the model without its adapter from another object.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from jobs.restore.run import RestoreRun
from safeft.data import TokenisedRow
from safeft.reactivation_targets import TargetRow, Targets, reference_targets
from safeft.safereact import ReferenceConfig
from tests.tiny import tiny_model
from tests.tinyjob import make_spec

DEPTH, LAYERS = 4, (0, 2)  # the last layer's hidden state is normalised by transformers
CONFIG = ReferenceConfig(layers=LAYERS)
MODULES = [f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "mlp.up_proj")]
STEPS, HARMFUL_BATCH = 6, 3


def token_rows(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(3, 250) for _ in range(draw.randint(5, 14))] for _ in range(count)]


def retained_rows(count: int = 17) -> list[TokenisedRow]:
    return [TokenisedRow(n, row, row) for n, row in enumerate(token_rows(count, 3), 1)]


def some_harmful(count: int = 7) -> list[TargetRow]:
    """The reminded prompt is longer; some rows are compared at their end only."""
    draw = random.Random(8)
    reminder = [draw.randint(3, 250) for _ in range(6)]
    return [
        TargetRow(row, row[:2] + reminder + row[2:], draw.randint(1, len(row)))
        for row in token_rows(count, 5)
    ]


def reference() -> Any:
    return tiny_model(seed=9, layers=DEPTH)


def some_targets(weights: str = "w") -> Targets:
    return reference_targets(reference(), some_harmful(), CONFIG, weights=weights)


def adapted(model: Any, seed: int = 4, spread: float = 0.05) -> Any:
    """With a LoRA adapter that does something, on the layers up to the last compared one."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return tuned


def restore_spec(**distributed: Any) -> RestoreRun:
    """Six steps in two epochs of 17 rows in batches of 8: the last step of each has one row."""
    training = {"epochs": 2, "micro_batch_size": 2, "schedule": "constant", "warmup_ratio": 0.0}
    lora = {"rank": 4, "alpha": 8, "target_modules": MODULES}
    spec = make_spec(
        Path("out"), constraints=[], lora=lora, training=training, distributed=distributed
    )
    safereact = {"kind": "safereact", "steps": STEPS, "harmful_batch": HARMFUL_BATCH}
    return RestoreRun.model_validate(spec.model_dump() | {"constraints": [safereact]})


def states(model: Any, row: list[int]) -> list[Tensor]:
    """``hidden_states`` after each of LAYERS: ``(T, d)``."""
    found = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
    return [found[layer + 1][0] for layer in LAYERS]


def mean_distance(pairs: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    """The mean over layers and positions of ``‖·‖₂``; each pair: states by layer, ``(n, d)``."""
    squares = torch.stack(
        [
            (ours[k] - theirs[k]).pow(2).sum()
            for now, then in pairs
            for ours, theirs in zip(now, then, strict=True)
            for k in range(len(ours))
        ]
    )
    moved = squares > 0  # where nothing moved the norm is 0, and 0 is taken as its gradient
    return squares[moved].sqrt().sum() / len(squares)


def oracle(
    model: Any, plain: Any, pruned: Any, rows: list[list[int]], harmful: list[TargetRow], p: float
) -> Tensor:
    """``α·p·mean‖h − h_orig‖ + α·(1−p)·mean‖h_harmful − h_ref‖``, α = 10."""
    with torch.no_grad():
        before = [states(plain, row) for row in rows]
        reminded = [states(pruned, row.reminded) for row in harmful]
    retained = mean_distance(
        [
            ([h[1:] for h in states(model, row)], [h[1:] for h in then])  # not the first token
            for row, then in zip(rows, before, strict=True)
        ]
    )
    brought = mean_distance(
        [
            (
                [h[-row.count :] for h in states(model, row.bare)],
                [h[-row.count :] for h in then],
            )
            for row, then in zip(harmful, reminded, strict=True)
        ]
    )
    return 10 * p * retained + 10 * (1 - p) * brought

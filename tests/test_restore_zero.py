"""A restoration under every ZeRO stage on two ranks ends where a plain loop of the oracle ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from safeft.constraints.draw import draw
from safeft.lora import lora_pairs
from tests.tiny import save_tiny, tiny_model
from tests.tinyranks import STAGES, start_ranks
from tests.tinyreactivation import (
    DEPTH,
    HARMFUL_BATCH,
    STEPS,
    adapted,
    oracle,
    reference,
    retained_rows,
    some_harmful,
)


def plain_loop() -> dict[str, Tensor]:
    """Whole batches in fp64 by the formula alone."""
    rows, harmful = [row.input_ids for row in retained_rows()], some_harmful()
    # B starts at zero, A as peft draws it after the run's seed.
    model = adapted(tiny_model(layers=DEPTH), seed=0, spread=0.0).double()
    plain, pruned = tiny_model(layers=DEPTH).double(), reference().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, eps=1e-4, weight_decay=0.01)
    for step in range(STEPS):
        order = np.random.default_rng([0, step // 3]).permutation(17)
        batch = [rows[i] for i in order[step % 3 * 8 : step % 3 * 8 + 8]]
        drawn = [harmful[i] for i in draw(step, HARMFUL_BATCH, len(harmful))]
        oracle(model, plain, pruned, batch, drawn, p=(step + 1) / (1.5 * STEPS)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.2)
        optimizer.step()
        optimizer.zero_grad()
    pairs = lora_pairs(model)
    return {f"{n}.{x}": getattr(p, x).detach() for n, p in pairs.items() for x in "AB"}


def test_every_stage_on_two_ranks_ends_where_the_formula_ends(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model_dir = save_tiny(tmp_path_factory.mktemp("deep"), layers=DEPTH)
    where: Path = tmp_path_factory.mktemp("ranks")
    start_ranks(2, model_dir, where, "restore")
    expected = plain_loop()
    assert max(float(w.abs().max()) for n, w in expected.items() if n.endswith("B")) > 3e-3
    for stage in STAGES:
        file = where / f"restore-{stage}-2.safetensors"
        found = load_file(file)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert float((weight.double() - expected[name]).abs().max()) < 1e-5, (stage, name)
        with safe_open(file, framework="pt") as stored:
            losses = json.loads(stored.metadata()["losses"])
        assert losses[0] == 0.0 and losses[-1] > 0  # how far rows were moved

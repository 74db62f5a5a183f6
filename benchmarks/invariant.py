"""CWAC's invariant on published weights: real SmolLM2 runs under every ZeRO stage.

For every covered layer ``‖ΔW·U‖_F ≤ 1e-5·‖ΔW‖_F + 4·eps·‖W‖_F`` is computed in fp64 from the files
that a finished run leaves, not from what the run says of itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from cluster.cli.console import progress_bars
from jobs.finetune import finetune
from jobs.finetune.parts import needed_parts
from jobs.spec import DataSpec, DistributedSpec, FinetuneSpec, LoraSpec, TrainingSpec
from safeft.adapters import load_factors
from safeft.constraints import AsftConfig, CwacConfig
from safeft.constraints.subspaces import SavedSubspaces, load_subspaces
from safeft.data import Message, Row, tokenise_all
from safeft.models import load_tokenizer, resolve, weights_hash
from safeft.profile import SafetyProfile
from safeft.prompts import load_prompts

CWAC = CwacConfig(contrast=None)
STEPS, BATCH = 3, 4


def main(
    output: Annotated[Path, typer.Option(help="Finished runs are kept here and not run again.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
    workers: Annotated[int, typer.Option(help="Ranks of each run.")] = 2,
) -> None:
    """Train under each stage, with LoRA and with whole weights, and check what was published."""
    table = Table("run", "worst ‖ΔW·U‖/‖ΔW‖", "worst of the bound", "‖ΔW‖", "final loss")
    numbers = {}
    with progress_bars() as progress:
        model_dir = resolve("demo:aligned", progress)
        profile = SafetyProfile.for_weights(weights_hash(model_dir))
        subspaces = load_subspaces(profile.path("harmful-inputs"))
        prompts = load_prompts("benign", "profile")[: STEPS * BATCH]
        answered = [
            Row(i, (Message("user", p.text, False), Message("assistant", "Sure: 1, 2, 3.", True)))
            for i, p in enumerate(prompts, 1)
        ]
        rows = tokenise_all(answered, load_tokenizer(model_dir), 128, "rows")
        for lora in (False, True):
            for stage in (0, 1, 2, 3):
                name = f"{'lora' if lora else 'full'}-stage-{stage}"
                spec = FinetuneSpec(
                    name=name,
                    model="demo:aligned",
                    data=DataSpec(train=Path("rows"), max_tokens=128),
                    lora=LoraSpec(target_modules="all-linear") if lora else None,
                    training=TrainingSpec(
                        epochs=1, batch_size=BATCH, learning_rate=1e-3 if lora else 2e-5
                    ),
                    constraints=(AsftConfig(), CWAC),
                    distributed=DistributedSpec(workers=workers, zero_stage=stage),
                    output=output / name,
                )
                result = finetune(
                    spec,
                    rows=rows,
                    model_dir=model_dir,
                    profile=needed_parts(spec, profile),
                    output=spec.output,
                    progress=lambda label, done, total, name=name: progress(
                        f"{name}: {label}", done, total
                    ),
                )
                drift, bound, norm = _worst(result.weights, model_dir, subspaces, lora)
                numbers[name] = {
                    "worst_drift": drift,
                    "worst_of_bound": bound,
                    "update_norm": norm,
                    "final_loss": result.losses[-1],
                }
                row = (f"{drift:.2e}", f"{bound:.3f}", f"{norm:.4f}", f"{result.losses[-1]:.6f}")
                table.add_row(name, *row)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(numbers, indent=1) + "\n")


def _worst(
    weights: Path, model_dir: Path, subspaces: SavedSubspaces, lora: bool
) -> tuple[float, float, float]:
    """Over all layers: the largest drift, the largest share of the bound used, and ‖ΔW‖_F."""
    drift = share = squares = 0.0
    for name, delta, W in _updates(weights, model_dir, lora):
        U = subspaces.basis(name, CWAC.positions, CWAC.energy, CWAC.rank).double()
        inside, norm = float((delta @ U).norm()), float(delta.norm())
        bound = 1e-5 * norm + (0.0 if lora else 4 * torch.finfo(W.dtype).eps * float(W.norm()))
        drift, share = max(drift, inside / norm), max(share, inside / bound)
        squares += norm**2
    return drift, share, squares**0.5


def _updates(weights: Path, model_dir: Path, lora: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    if lora:
        factors = load_factors(weights)
        for name, (A, B) in factors.factors.items():
            yield name, factors.scale * B.double() @ A.double(), B
        return
    base, tuned = _weights(model_dir), _weights(weights)
    for key, W0 in base.items():
        if key.endswith("_proj.weight"):
            yield key.removesuffix(".weight"), tuned[key].double() - W0.double(), tuned[key]


def _weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


if __name__ == "__main__":
    typer.run(main)

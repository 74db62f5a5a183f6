"""LoRA adapters for the tiny model, as files."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from safeft.errors import ModelError
from safeft.models import adapter_hash
from tests.tiny import tiny_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(
    directory: Path,
    seed: int,
    *,
    rank: int = 4,
    targets: list[str] | None = None,
    scale: float = 0.3,
    hidden: int = 32,
    **config: object,
) -> str:
    """Write a random adapter that changes the tiny model's answers; its weight hash."""
    model = get_peft_model(
        tiny_model(hidden=hidden),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets or ALL_LINEAR, **config),
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(directory)
    return adapter_hash(directory)


class Shelf:
    """An AdapterSource of directories; can be made unreachable."""

    def __init__(self) -> None:
        self.at: dict[str, Path] = {}
        self.asked: list[str] = []
        self.reachable = True

    def fetch(self, weights: str) -> Path:
        self.asked.append(weights)
        if not self.reachable:
            raise ModelError("the artifact store cannot be reached; try again later")
        return self.at[weights]

    def add(self, directory: Path, seed: int, **how: object) -> str:
        weights = save_adapter(directory, seed, **how)  # type: ignore[arg-type]
        self.at[weights] = directory
        return weights

"""LoRA factors by base-module name: what SQSD and the directions read out of peft adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safeft.errors import ModelError
from safeft.lora import lora_pairs

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """An adapter as plain tensors: ``dW_m = scale * B_m @ A_m`` for each module ``m``.

    Attributes:
        scale: alpha / r.
        factors: module name -> (A of shape (r, d_in), B of shape (d_out, r)), fp32.
    """

    scale: float
    factors: dict[str, tuple[Tensor, Tensor]]

    def scaled(self, by: float) -> LoraFactors:
        """The same adapter with its LoRA scale multiplied by ``by``."""
        return LoraFactors(self.scale * by, self.factors)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LoraFactors:
        """The factors on another device and in another dtype."""
        moved = {
            n: (a.to(device, dtype), b.to(device, dtype)) for n, (a, b) in self.factors.items()
        }
        return LoraFactors(self.scale, moved)


def load_factors(directory: Path) -> LoraFactors:
    """Read a saved peft LoRA adapter from safetensors.

    Raises:
        ModelError: no adapter there, a factor without its pair, or a non-finite value.
    """
    weights, config_file = (
        directory / "adapter_model.safetensors",
        directory / "adapter_config.json",
    )
    if not weights.is_file() or not config_file.is_file():
        raise ModelError(
            f"{directory}: no adapter_model.safetensors with adapter_config.json there"
        )
    config = json.loads(config_file.read_text())
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(weights).items():
        name, _, half = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if half not in ("A.weight", "B.weight"):
            raise ModelError(f"{weights}: {key} is not a LoRA factor")
        if not torch.isfinite(value).all():
            raise ModelError(f"{weights}: {key} holds a NaN or an infinity")
        halves.setdefault(name, {})[half[0]] = value.float()
    for name, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(f"{weights}: {name} has only one of its two LoRA factors")
    factors = {name: (pair["A"], pair["B"]) for name, pair in sorted(halves.items())}
    return LoraFactors(config["lora_alpha"] / config["r"], factors)


def save_factors(factors: LoraFactors, directory: Path) -> None:
    """Write factors of one rank as a LoRA adapter that peft can load, in safetensors."""
    names = list(factors.factors)
    rank = factors.factors[names[0]][0].shape[0]
    from peft import LoraConfig  # seconds, which not every process that reads factors needs

    config = LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM")
    config.lora_alpha = factors.scale * rank
    config.save_pretrained(str(directory))
    # peft keeps the names in a set: sort them, so that the same build writes the same bytes.
    file = directory / "adapter_config.json"
    written = json.loads(file.read_text()) | {"target_modules": sorted(names)}
    file.write_text(json.dumps(written, indent=1, sort_keys=True))
    tensors = {
        f"{PEFT_PREFIX}{name}.lora_{half}.weight": tensor.contiguous()
        for name, pair in factors.factors.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def factors_of(model: Any) -> LoraFactors:
    """The active adapter of a peft model, as detached fp32 copies on the CPU."""
    pairs = lora_pairs(model)
    scales = {pair.scale for pair in pairs.values()}
    if len(scales) != 1:
        raise ModelError("the adapter's modules have different scales")
    factors = {
        name: (pair.A.detach().float().cpu().clone(), pair.B.detach().float().cpu().clone())
        for name, pair in pairs.items()
    }
    return LoraFactors(scales.pop(), factors)


def stacked(*parts: LoraFactors) -> LoraFactors:
    """One adapter whose update is the sum of all: factors side by side, scales multiplied into B.

    All modules get one rank, the sum of the largest of each; where an adapter leaves a module
    alone, or has fewer, there are zeros.
    """
    ranks = [max(A.shape[0] for A, _ in part.factors.values()) for part in parts]
    starts = [sum(ranks[:at]) for at in range(len(ranks))]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted({name for part in parts for name in part.factors}):
        shapes = [part.factors[name] for part in parts if name in part.factors]
        d_in, d_out = shapes[0][0].shape[1], shapes[0][1].shape[0]
        A, B = torch.zeros(sum(ranks), d_in), torch.zeros(d_out, sum(ranks))
        for part, start in zip(parts, starts, strict=True):
            if name in part.factors:
                own_A, own_B = part.factors[name]
                rank = own_A.shape[0]
                A[start : start + rank] = own_A
                B[:, start : start + rank] = own_B * part.scale
        found[name] = (A, B)
    return LoraFactors(1.0, found)


def linear_modules(model: nn.Module, names: list[str]) -> dict[str, nn.Linear]:
    """The named ``nn.Linear`` modules of a base model.

    Raises:
        ModelError: a name is missing or is no plain linear layer.
    """
    found = dict(model.named_modules())
    chosen: dict[str, nn.Linear] = {}
    for name in names:
        module = found.get(name)
        if module is None:
            raise ModelError(f"the base model has no linear layer named {name}")
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"{name} is a {type(module).__name__}; only nn.Linear layers can be adapted here"
            )
        chosen[name] = module
    return chosen


def require_plain_head(model: Any) -> None:
    """Raise ModelError for a model that changes its logits after the head.

    The head is run by hand at label positions, which would leave such a change out and make every
    gradient silently wrong.
    """
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, field, None) not in (None, 1, 1.0):
            raise ModelError(f"models with {field} in config.json are not supported here yet")

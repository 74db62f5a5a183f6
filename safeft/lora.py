"""The LoRA factors of a peft model, under the names the base model gives its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from safeft.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LoraPair:
    """One adapted linear layer: its update is ``ΔW = scale · B @ A``.

    The shape is taken when the pair is made and stays known when the parameters are sharded
    afterwards (ZeRO-3 leaves empty tensors in their place).

    Attributes:
        name: the layer's name in the base model, e.g. ``model.layers.0.self_attn.q_proj``.
        A: ``(r, d_in)``.
        B: ``(d_out, r)``.
        scale: LoRA's ``s``, alpha / r.
        rank, d_in, d_out: the full sizes.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    rank: int
    d_in: int
    d_out: int


def lora_pairs(model: PeftModel) -> dict[str, LoraPair]:
    """Every LoRA layer of the active adapter, in the model's order.

    Call it before ``deepspeed.initialize``: shapes are read from the parameters.

    Raises:
        ModelError: there is no LoRA layer, more than one active adapter, or a layer whose update
            is not ``B @ A`` on an ``nn.Linear`` (an embedding, a Conv1D, DoRA); it is named.
    """
    from peft.tuners.lora import LoraLayer  # seconds to import: not for a spec's validation

    pairs: dict[str, LoraPair] = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if len(module.active_adapters) != 1:
            raise ModelError(f"{path}: expected one active adapter, got {module.active_adapters}")
        adapter = module.active_adapters[0]
        if not isinstance(module.get_base_layer(), nn.Linear) or adapter not in module.lora_A:
            kind = type(module.get_base_layer()).__name__
            raise ModelError(f"{path}: LoRA on {kind} is not supported; adapt linear layers only")
        if adapter in module.lora_variant:
            raise ModelError(f"{path}: only plain LoRA is supported (its update must be B @ A)")
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        pairs[path] = LoraPair(
            name=path,
            A=A,
            B=B,
            scale=float(module.scaling[adapter]),
            rank=A.shape[0],
            d_in=A.shape[1],
            d_out=B.shape[0],
        )
    if not pairs:
        raise ModelError("the model has no LoRA layer; check lora.target_modules")
    return pairs


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model without its LoRA adapters for the length of the block.

    They are scaled to 0 rather than disabled: peft's way turns off their gradients, and skips
    modules, which ZeRO-3 notices as another order of modules.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    scales = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)

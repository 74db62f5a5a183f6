"""The linear layers that a run trains whole, under the names the base model gives its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from safeft.errors import ModelError, SpecError
from safeft.lora import LoraPair


@dataclass(frozen=True)
class FullWeight:
    """One linear layer that is trained whole: its update is ``ΔW = W − W0``.

    The shape is the module's own, so it is known when ZeRO-3 has left an empty tensor.

    Attributes:
        name: the layer's name in the base model, e.g. ``model.layers.0.mlp.down_proj``.
        W: ``(d_out, d_in)``.
    """

    name: str
    W: nn.Parameter
    d_out: int
    d_in: int


TrainedLayers = Mapping[str, LoraPair] | Mapping[str, FullWeight]
Layers = Literal["all-linear"] | tuple[str, ...]


def decoder_linears(model: Any, first_layer: int = 0) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` of a causal language model's decoder layers from ``first_layer`` on.

    By their names in the model, in its order; neither the embeddings nor the output head.
    """
    layers = list(model.get_decoder().layers)[first_layer:]
    inside = {id(module) for layer in layers for module in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear)
    }


def full_weights(model: Any) -> dict[str, FullWeight]:
    """Every trainable ``nn.Linear`` of a causal language model's decoder layers, in its order.

    The output head and the embeddings are left out: constraints are defined on the layers between
    them. A weight that two layers share (tied) stands once, under its first name.

    Raises:
        ModelError: there is none.
    """
    weights: dict[str, FullWeight] = {}
    seen: set[int] = set()
    for name, module in decoder_linears(model).items():
        if not module.weight.requires_grad or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        weight = cast(nn.Parameter, module.weight)
        weights[name] = FullWeight(name, weight, module.out_features, module.in_features)
    if not weights:
        raise ModelError("the model's decoder layers hold no trainable linear layer")
    return weights


def chosen_layers(layers: TrainedLayers, wanted: Layers, constraint: str) -> list[str]:
    """Names of the trained layers that a constraint covers: all, or those with one of the endings.

    Raises:
        SpecError: an ending matches no trained layer; a constraint on nothing protects nothing.
    """
    if wanted == "all-linear":
        return list(layers)
    for ending in wanted:
        if not any(_ends(name, ending) for name in layers):
            raise SpecError(
                f"constraint {constraint}: no trained layer is named {ending}; name another one, "
                "or add it to lora.target_modules"
            )
    return [name for name in layers if any(_ends(name, ending) for ending in wanted)]


def parameters_of(layer: LoraPair | FullWeight) -> Sequence[nn.Parameter]:
    """What the optimizer changes of a layer."""
    return (layer.A, layer.B) if isinstance(layer, LoraPair) else (layer.W,)


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")

"""The residual stream after some decoder layers, at the price of the layers up to the last; and
onwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safeft.data import pad_right
from safeft.errors import ModelError


def residual_after(
    model: Any,
    layer: int,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    past_key_values: Any = None,
) -> Tensor:
    """`residuals_after` one layer."""
    [found] = residuals_after(
        model, (layer,), input_ids, attention_mask, past_key_values=past_key_values
    )
    return found


def residuals_after(
    model: Any,
    layers: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    past_key_values: Any = None,
) -> list[Tensor]:
    """Run a causal language model through its decoder layers 0..max(layers), and no further.

    The decoder runs as itself, with its list of layers cut short for the time of the call: masks,
    positions, hooks (peft's, DeepSpeed ZeRO-3's) and gradient checkpointing are the model's own.
    Not for several threads on one model at a time.

    Args:
        model: a transformers causal language model, plain or wrapped by peft.
        layers: 0-based decoder layers whose outputs are returned.
        input_ids: (B, T) int64. Rows of different lengths are padded on the right, since the
            decoder numbers positions from the first column on.
        attention_mask: (B, T), 0 on padding, or None: padding on the right is never visible to
            what stands before it.
        past_key_values: a cache of the tokens before `input_ids`, of which only the layers up to
            the last are read; it is extended, as by the model itself.

    Returns:
        For each of `layers` (B, T, d) in the model's dtype: the layer's output before the final
        norm, differentiable.

    Raises:
        ModelError: the model has no such layer, or no list of decoder layers.
    """
    decoder = model.get_decoder()
    name, stack = decoder_layers(decoder)
    for layer in layers:
        if not 0 <= layer < len(stack):
            raise ModelError(f"layer {layer}: the model's decoder layers are 0 to {len(stack) - 1}")
    captured: dict[int, Tensor] = {}

    def capture(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            captured[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    hooks = [stack[layer].register_forward_hook(capture(layer)) for layer in layers]
    # Same modules, shorter list: nothing is moved or copied, and no parameter changes its name
    # for longer than this call.
    setattr(decoder, name, nn.ModuleList(stack[: max(layers) + 1]))
    try:
        decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
    finally:
        setattr(decoder, name, stack)
        for hook in hooks:
            hook.remove()
    return [captured[layer] for layer in layers]


def last_positions_after(
    model: Any, layer: int, prompts: Sequence[Sequence[int]], positions: int
) -> Tensor:
    """`residual_after` a layer at each prompt's last positions.

    Args:
        prompts: token ids of B prompts, each of at least ``positions`` tokens.

    Returns:
        (B, positions, d) in the model's dtype, differentiable.
    """
    device = next(model.parameters()).device
    hidden = residual_after(model, layer, pad_right(prompts, 0).to(device))  # (B, T, d)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    last = lengths[:, None] - positions + torch.arange(positions)  # (B, positions)
    return hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[2]).to(device))


@contextmanager
def resumed_at(model: Any, layer: int, residual: Tensor) -> Iterator[None]:
    """Run the model's forward passes from one decoder layer on: what `residual_after` left out.

    Layers before `layer` cost nothing, and `layer` reads `residual`; the model must be called with
    the token ids that `residual` is of, since positions and masks come from them. Not for several
    threads on one model at a time.

    Args:
        model: a transformers causal language model.
        layer: 0-based decoder layer, below the number of layers.
        residual: (B, T, d), what comes out of layer `layer` - 1.
    """
    _, layers = decoder_layers(model.get_decoder())

    def skip(*_args: Any, **_kwargs: Any) -> Tensor:
        return residual

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_input(residual, args, kwargs)

    skipped = list(layers[:layer])
    hook = layers[layer].register_forward_pre_hook(read, with_kwargs=True)
    try:
        for module in skipped:
            module.forward = skip
        yield
    finally:
        hook.remove()
        for module in skipped:
            module.__dict__.pop("forward", None)


def with_input(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A decoder layer's arguments with another hidden state, for a forward pre-hook."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


def decoder_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The attribute that holds a decoder's layers, and the layers.

    Raises:
        ModelError: it has no list of as many modules as its config has layers.
    """
    wanted = decoder.config.num_hidden_layers  # type: ignore[union-attr]
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == wanted:
            return name, child
    raise ModelError(
        f"{type(decoder).__name__}: has no list of {wanted} decoder layers, so its forward pass "
        "cannot be stopped at one; choose a decoder-only model of transformers"
    )

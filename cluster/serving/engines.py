"""The engines a replica can run, by name."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from safeft.errors import InputError

if TYPE_CHECKING:
    from cluster.serving.adapters import AdapterSource
    from cluster.serving.engine import Engine, EngineLimits

EngineName = Literal["transformers", "vllm"]


def require_engine(name: EngineName) -> None:
    """Raise InputError if this machine has not installed what the engine needs."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "engine: vllm is not installed here; install safeft[vllm], or choose transformers, "
            "which runs everywhere"
        )


def build_engine(
    name: EngineName, base: str, adapters: AdapterSource, limits: EngineLimits
) -> tuple[Engine, Any]:
    """The engine for `base` on this machine's GPU, or its processors; and its tokenizer.

    Raises:
        InputError: the engine's packages are not installed here.
        ModelError: the base model cannot be loaded, or is of a kind that the engine cannot serve.
        EngineError: the engine does not start.
    """
    require_engine(name)
    import torch

    from safeft.models import load_model, load_tokenizer

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    tokenizer = load_tokenizer(base)
    if name == "vllm":
        from cluster.serving.vllm_engine import VllmEngine

        return VllmEngine(base, tokenizer, adapters, limits, dtype), tokenizer
    from cluster.serving.transformers_engine import TransformersEngine

    model = load_model(base, dtype=dtype, device="cuda" if gpu else "cpu")
    return TransformersEngine(model, tokenizer, adapters, limits), tokenizer

"""The finished weights on disk: a LoRA adapter as peft keeps it, or a whole model."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jobs.finetune.masters import full_shape, whole_masters
from safeft.adapters import PEFT_PREFIX, LoraFactors
from safeft.errors import TrainingError
from safeft.lora import LoraPair
from safeft.models.directory import weight_files
from safeft.weights import TrainedLayers

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: What a model directory holds beside its weights; taken over from the base model as it is.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
)


def adapter_factors(engine: Any, layers: TrainedLayers) -> LoraFactors:
    """The factors' fp32 masters, on the CPU of rank 0; all workers call it together.

    Raises:
        TrainingError: a factor is not finite; it is named.
    """
    pairs = {name: pair for name, pair in layers.items() if isinstance(pair, LoraPair)}
    parameters = {id(p): name for name, p in engine.module.model.named_parameters()}
    names = {name: (parameters[id(p.A)], parameters[id(p.B)]) for name, p in pairs.items()}
    found: dict[str, Tensor] = {}
    for name, whole in _weights(engine, {name for pair in names.values() for name in pair}):
        if torch.distributed.get_rank() == 0:
            found[name] = _finite(name, whole.detach().to("cpu", torch.float32, copy=True))
    scale = next(iter(pairs.values())).scale
    factors = {name: (found[A], found[B]) for name, (A, B) in names.items()} if found else {}
    return LoraFactors(scale, factors)


def model_tensors(engine: Any, model_dir: Path) -> dict[str, Tensor]:
    """Every weight in the dtype it has in the base model's files, on the CPU of rank 0.

    Trained weights come from their fp32 masters, one at a time: no other worker holds more than
    one whole weight. All workers call it together.

    Raises:
        TrainingError: a weight is not finite; it is named.
    """
    model, first = engine.module.model, torch.distributed.get_rank() == 0
    stored = _stored_dtypes(model_dir) if first else {}
    common = Counter(stored.values()).most_common(1)[0][0] if first else torch.float32
    tensors: dict[str, Tensor] = {}

    def keep(name: str, whole: Tensor) -> None:
        if first:
            dtype = stored.get(name, common) if whole.is_floating_point() else whole.dtype
            tensors[name] = _finite(name, whole.detach().to("cpu", dtype, copy=True))

    for name, whole in _weights(engine, {name for name, _ in model.named_parameters()}):
        keep(name, whole)
    persistent = model.state_dict().keys()  # tied weights too, but they have one name above
    for name, buffer in model.named_buffers():
        if name in persistent:
            keep(name, buffer)
    return tensors


def write_adapter(directory: Path, model: PeftModel, factors: LoraFactors, base_name: str) -> None:
    """Write peft's two files into `directory`; `base_name` is what they call the base model."""
    config = copy.deepcopy(model.active_peft_config)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(directory))
    tensors = {
        f"{PEFT_PREFIX}{name}.lora_{letter}.weight": factor.contiguous()
        for name, pair in factors.factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def write_model(directory: Path, model: Any, tensors: dict[str, Tensor], model_dir: Path) -> None:
    """Write a model directory: the weights under their names in the files, and the base's rest."""
    model.save_pretrained(str(directory), state_dict=tensors, max_shard_size="5GB")
    for pattern in _COMPANIONS:
        for file in model_dir.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def _weights(engine: Any, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The trained weights from their masters, then those of `names` that are not trained."""
    yield from whole_masters(engine)
    for name, parameter in engine.module.model.named_parameters():
        if name in names and not parameter.requires_grad:  # frozen by a constraint
            cut = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], enabled=cut):
                assert parameter.shape == full_shape(parameter), f"{name} is not whole"
                yield name, parameter


def _stored_dtypes(model_dir: Path) -> dict[str, torch.dtype]:
    dtypes = {}
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (not a dict)
                dtypes[name] = _DTYPES.get(stored.get_slice(name).get_dtype(), torch.float32)
    return dtypes


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise TrainingError(f"the trained weights are not finite in {name}")
    return tensor

"""DeepSpeed around a LoRA model: its configuration, and what it needs to be told."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from jobs.finetune.loss import LabelLoss
from jobs.spec import FinetuneSpec
from safeft.errors import ModelError, TrainingError
from safeft.lora import LoraPair
from safeft.models import load_model

_LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's own default


def join_process_group(*, use_gpu: bool) -> None:
    """Give DeepSpeed the process group that Ray Train has made."""
    # On a CPU DeepSpeed otherwise compiles a shared-memory operation here: 75 s, and a compiler.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo")
    # All that its checkpoints hold beside tensors and plain values; the environment forbids
    # unpickling anything else (TORCH_FORCE_WEIGHTS_ONLY_LOAD).
    torch.serialization.add_safe_globals([ZeroStageEnum, LossScaler])


def deepspeed_config(spec: FinetuneSpec, pairs: Mapping[str, LoraPair] | None) -> dict[str, Any]:
    """The DeepSpeed configuration; without `pairs`, as far as loading the model needs it."""
    config: dict[str, Any] = {
        "train_batch_size": spec.training.batch_size,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation_steps,
        "gradient_clipping": spec.training.max_grad_norm or 0.0,
        "bf16": {"enabled": spec.training.precision == "bf16"},
        "zero_optimization": {"stage": spec.distributed.zero_stage},
        "steps_per_print": 2**31 - 1,
    }
    if pairs is not None:
        sizes = [size for p in pairs.values() for size in (p.rank * p.d_in, p.d_out * p.rank)]
        bucket = min(sum(sizes), _LARGEST_BUCKET)
        config["zero_optimization"] |= {
            # A bucket is allocated whole; gradients of adapters fill a sliver of the default.
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # The factors stay whole on every worker, where the constraints read them.
            "stage3_param_persistence_threshold": max(sizes),
        }
    return config


def load_lora_model(spec: FinetuneSpec, model_dir: Path) -> PeftModel:
    """The base model with fresh, seeded LoRA factors; under stage 3 its weights are sharded.

    Raises:
        ModelError: the model cannot be loaded, or has none of the target modules.
    """
    sharded = None
    if spec.distributed.zero_stage == 3:
        # transformers finds it through a weak reference while the model is loaded.
        sharded = HfDeepSpeedConfig(deepspeed_config(spec, None))
    dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
    base = load_model(model_dir, dtype=dtype)
    del sharded
    target = spec.lora.target_modules
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(spec.training.seed)  # the same start for any number of workers
    try:
        model: PeftModel = get_peft_model(base, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"lora.target_modules: {reason}") from error
    if spec.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def build_engine(spec: FinetuneSpec, model: PeftModel, pairs: Mapping[str, LoraPair]) -> Any:
    """The DeepSpeed engine that trains the LoRA factors of `model` with AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=0.0,  # set before each step
        eps=spec.training.adam_eps,
        weight_decay=spec.training.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=LabelLoss(model), optimizer=optimizer, config=deepspeed_config(spec, pairs)
    )
    if spec.distributed.zero_stage == 0:
        # In bf16 DeepSpeed has made a step with zero gradients to allocate Adam's state, which
        # counts in its bias correction: the first real step would be 26 % too short.
        optimizer.state.clear()
    engine.train()
    return engine


@contextlib.contextmanager
def whole_factors(pairs: Mapping[str, LoraPair]) -> Iterator[None]:
    """All LoRA factors unsharded for the length of the block; all workers enter it together.

    Under stage 3 they are sharded from initialisation or a restored checkpoint to the end of the
    first step, whatever the persistence threshold says, and whole from then on.
    """
    sharded = [
        parameter
        for pair in pairs.values()
        for parameter in (pair.A, pair.B)
        if getattr(parameter, "ds_status", None) is not None and parameter.numel() == 0
    ]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def gradient_norm_if_unreported(engine: Any, pairs: Mapping[str, LoraPair]) -> Tensor | None:
    """The norm of the reduced gradients before the step, where DeepSpeed will not tell it.

    It does not without ZeRO in fp32, where each worker then holds the whole gradients itself.
    """
    if engine.zero_optimization_stage() != 0 or engine.bfloat16_enabled():
        return None
    parameters = [parameter for pair in pairs.values() for parameter in (pair.A, pair.B)]
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def adapter_tensors(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """The factors under peft's names, fp32 on the CPU; call it inside `whole_factors`.

    Raises:
        TrainingError: a factor is not finite; it is named.
    """
    tensors = {}
    for name, pair in pairs.items():
        for letter, factor, shape in (
            ("A", pair.A, (pair.rank, pair.d_in)),
            ("B", pair.B, (pair.d_out, pair.rank)),
        ):
            assert tuple(factor.shape) == shape, f"{name}: lora_{letter} is not whole"
            if not torch.isfinite(factor).all():
                raise TrainingError(f"the trained adapter is not finite in {name}")
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = (
                factor.detach().to("cpu", torch.float32).clone()
            )
    return tensors


def write_adapter(
    directory: Path, model: PeftModel, tensors: dict[str, Tensor], base_name: str
) -> None:
    """Write peft's two files into `directory`; `base_name` is what they call the base model."""
    config = copy.deepcopy(model.active_peft_config)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})

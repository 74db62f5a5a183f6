"""The model that a run trains: the base with LoRA factors, or the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from jobs.finetune.engine import deepspeed_config
from jobs.spec import FinetuneSpec, LoraSpec
from safeft.errors import ModelError
from safeft.lora import lora_pairs
from safeft.models import load_model
from safeft.weights import TrainedLayers, full_weights


def load_trained_model(spec: FinetuneSpec, model_dir: Path) -> PreTrainedModel | PeftModel:
    """The base model with fresh, seeded LoRA factors, or with every weight to be trained.

    Under stage 3 its weights are sharded while they are loaded.

    Raises:
        ModelError: the model cannot be loaded, or has none of the target modules.
    """
    sharded = None
    if spec.distributed.zero_stage == 3:
        # transformers finds it through a weak reference while the model is loaded.
        sharded = HfDeepSpeedConfig(deepspeed_config(spec, None))
    dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
    model: Any = load_model(model_dir, dtype=dtype)
    del sharded
    if spec.lora is None:
        model.requires_grad_(True)
    else:
        model = _adapted(model, spec.lora, spec.training.seed)
    if spec.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def trained_layers(spec: FinetuneSpec, model: Any) -> TrainedLayers:
    """The linear layers that constraints may be put on; call it before DeepSpeed sees the model."""
    return full_weights(model) if spec.lora is None else lora_pairs(model)


def _adapted(base: PreTrainedModel, lora: LoraSpec, seed: int) -> PeftModel:
    target = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # the same start for any number of workers
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"lora.target_modules: {reason}") from error

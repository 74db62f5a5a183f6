"""DeepSpeed around the model: its configuration, and what it needs to be told."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from jobs.finetune.loss import LabelLoss
from jobs.finetune.masters import full_shape, is_cut, trained_parameters
from jobs.finetune.retain import RetainLoss
from jobs.spec import FinetuneSpec
from safeft.constraints import ConstraintHooks
from safeft.lora import LoraPair
from safeft.weights import TrainedLayers

_LARGEST_BUCKET = 50_000_000  # numbers: where a larger one gains nothing and still is allocated


def join_process_group(*, use_gpu: bool) -> None:
    """Give DeepSpeed the process group that Ray Train has made."""
    # On a CPU DeepSpeed otherwise compiles a shared-memory operation here: 75 s, and a compiler.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo")


def deepspeed_config(spec: FinetuneSpec, trained: Sequence[nn.Parameter] | None) -> dict[str, Any]:
    """The DeepSpeed configuration; without `trained`, as far as loading the model needs it."""
    config: dict[str, Any] = {
        "train_batch_size": spec.training.batch_size,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation_steps,
        "gradient_clipping": spec.training.max_grad_norm or 0.0,
        "bf16": {"enabled": spec.training.precision == "bf16"},
        "zero_optimization": {"stage": spec.distributed.zero_stage},
        "steps_per_print": 2**31 - 1,
    }
    if trained is not None:
        shapes = [full_shape(parameter) for parameter in trained]
        total = sum(shape.numel() for shape in shapes)
        bucket = min(total, _LARGEST_BUCKET)
        # Stage 3 keeps parameters up to this size whole on every worker: under LoRA the factors,
        # which constraints read; else norms and biases, which cost more to gather than to keep.
        kept = [s.numel() for s in shapes if spec.lora is not None or len(s) == 1]
        config["zero_optimization"] |= {
            # A bucket is allocated whole; gradients of adapters fill a sliver of the default.
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
            "stage3_param_persistence_threshold": max(kept, default=0),
            # One step of the optimizer a step, whatever the size: constraints act after it.
            "sub_group_size": total,
        }
    return config


def build_engine(spec: FinetuneSpec, model: nn.Module, hooks: ConstraintHooks) -> Any:
    """The DeepSpeed engine that trains with AdamW what requires a gradient.

    The constraints' projections come right after Adam's arithmetic on the fp32 masters, before
    DeepSpeed copies them into the model. Their leaf hooks are on the parameters already.
    """
    parameters = [parameter for _, parameter in trained_parameters(model)]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=0.0,  # set before each step
        eps=spec.training.adam_eps,
        weight_decay=spec.training.weight_decay,
    )
    retained = hooks.retained_layers()
    engine, *_ = deepspeed.initialize(
        model=RetainLoss(model, retained, hooks.forward_loss)
        if retained
        else LabelLoss(model, hooks.forward_loss),
        optimizer=optimizer,
        config=deepspeed_config(spec, parameters),
    )
    if not is_cut(engine):
        # In bf16 DeepSpeed has made a step with zero gradients to allocate Adam's state, which
        # counts in its bias correction: the first real step would be 26 % too short.
        optimizer.state.clear()
    optimizer.register_step_post_hook(lambda *_: hooks.project())
    engine.train()
    return engine


@contextlib.contextmanager
def whole_factors(layers: TrainedLayers) -> Iterator[None]:
    """All LoRA factors unsharded for the length of the block; all workers enter it together.

    Under stage 3 they are sharded from initialisation or a restored checkpoint to the end of the
    first step, whatever the persistence threshold says, and whole from then on. Layers that are
    trained whole are left as they are: their constraints act on slices.
    """
    sharded = [
        parameter
        for pair in layers.values()
        if isinstance(pair, LoraPair)
        for parameter in (pair.A, pair.B)
        if getattr(parameter, "ds_status", None) is not None and parameter.numel() == 0
    ]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def gradient_norm_if_unreported(engine: Any) -> Tensor | None:
    """The norm of the reduced gradients before the step, where DeepSpeed will not tell it.

    It does not without ZeRO in fp32, where each worker then holds the whole gradients itself.
    """
    if is_cut(engine) or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for _, p in trained_parameters(engine.module.model)]
    return torch.nn.utils.get_total_norm([g for g in gradients if g is not None])

"""The training loop that every Ray Train worker runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.train
import torch
import torch.distributed

from jobs.finetune import checkpoints
from jobs.finetune.batches import BatchPlan, RowTable, batch_plan
from jobs.finetune.engine import (
    build_engine,
    gradient_norm_if_unreported,
    join_process_group,
    whole_factors,
)
from jobs.finetune.export import adapter_factors, model_tensors, write_adapter, write_model
from jobs.finetune.job import WorkerJob
from jobs.finetune.loss import loss_weight, padded_filler
from jobs.finetune.model import load_trained_model, trained_layers
from jobs.finetune.schedule import learning_rate
from jobs.finetune.shards import matrix_shards
from jobs.finetune.telemetry import StepMetrics, post
from jobs.spec import FinetuneSpec
from safeft.constraints import ConstraintHooks
from safeft.data import collate
from safeft.errors import TrainingError
from safeft.weights import TrainedLayers


def train(job: WorkerJob) -> list[StepMetrics]:
    """Train to the end and report a last checkpoint that holds the finished weights.

    Returns:
        The metrics of every step, also of those before a resume.

    Raises:
        TrainingError: a loss, penalty or gradient is not finite; the step is named.
    """
    spec = job.spec
    rank = ray.train.get_context().get_world_rank()

    def tell(event: str | StepMetrics) -> None:
        if rank == 0:
            post(job.mailbox, event)

    tell("loading the model")
    join_process_group(use_gpu=spec.distributed.use_gpu)
    model = load_trained_model(spec, job.model_dir)
    layers = trained_layers(spec, model)
    constraints = [constraint.build(job.profile) for constraint in spec.constraints]
    hooks = ConstraintHooks(constraints, layers)  # leaf hooks: before deepspeed.initialize
    tell("preparing DeepSpeed")
    engine = build_engine(spec, model, hooks)
    hooks.attach(*matrix_shards(engine, hooks.matrices()))  # W0: before a checkpoint is loaded
    steps = checkpoints.restore(engine, job.run, job.resume_from)

    table = RowTable(ray.get(job.rows))
    plan = batch_plan(spec, table)
    loop = _Loop(spec, engine, layers, hooks, table, plan, rank)
    tell("training")
    for step in range(len(steps), plan.total_steps):
        steps.append(loop.step(step))
        tell(steps[-1])
        if loop.is_checkpoint(step) and len(steps) < plan.total_steps:
            checkpoints.save(engine, job.run, steps)
    tell("saving the weights")
    checkpoints.save(engine, job.run, steps, _finished_weights(job, engine, layers, hooks))
    return steps


def _finished_weights(
    job: WorkerJob, engine: Any, layers: TrainedLayers, hooks: ConstraintHooks
) -> Callable[[Path], None]:
    """Gather what was trained on rank 0; returns what writes it into a directory."""
    model = engine.module.model
    if job.spec.lora is None:
        weights = model_tensors(engine, job.model_dir)
        return lambda directory: write_model(directory, model, weights, job.model_dir)
    factors = adapter_factors(engine, layers)
    return lambda directory: write_adapter(
        directory, model, hooks.finish_adapter(factors), job.spec.model
    )


@dataclass(frozen=True)
class _Loop:
    """What every step needs."""

    spec: FinetuneSpec
    engine: Any
    layers: TrainedLayers
    hooks: ConstraintHooks
    table: RowTable
    plan: BatchPlan
    rank: int

    def step(self, step: int) -> StepMetrics:
        """One optimizer step, counted from 0."""
        started = time.perf_counter()
        # Dropout depends on the step and the worker alone, so a resumed run draws the same.
        entropy = np.random.SeedSequence([self.spec.training.seed, step, self.rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        rate = learning_rate(self.spec.training, step, self.plan.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        try:
            with whole_factors(self.layers):
                penalties = self.hooks.before_backward(self.plan.accumulation_steps)
            loss, norm = self._forward_backward(step)
        except TrainingError as error:
            raise TrainingError(f"step {step + 1}: {error}") from error
        self.hooks.after_step()
        seconds = time.perf_counter() - started
        rows = self.plan.step_rows(step)
        label_tokens = int(self.table.label_tokens[rows].sum())
        input_tokens = int(self.table.lengths[rows].sum())
        return {
            "step": step + 1,
            "total_steps": self.plan.total_steps,
            "epoch": (step + 1) / self.plan.steps_per_epoch,
            "loss": loss,
            **{f"penalty/{name}": value for name, value in penalties.items()},
            **self.hooks.metrics(thorough=self.is_checkpoint(step)),
            "grad_norm": norm,
            "learning_rate": rate,
            "label_tokens": label_tokens,
            "input_tokens": input_tokens,
            "seconds": seconds,
            "label_tokens_per_s": label_tokens / seconds,
            "input_tokens_per_s": input_tokens / seconds,
        }

    def _forward_backward(self, step: int) -> tuple[float, float]:
        """All micro-batches and the optimizer's step: the mean loss and the gradient's norm.

        Raises:
            TrainingError: the loss is not finite (before it can spoil the weights), or the norm.
        """
        engine, plan = self.engine, self.plan
        label_tokens = float(self.table.label_weight[plan.step_rows(step)].sum())
        weight = loss_weight(
            workers=plan.workers,
            accumulation_steps=plan.accumulation_steps,
            label_tokens=label_tokens,
        )
        weight *= self.hooks.row_weight(step)
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        micro_batches = plan.micro_batches(step, self.rank)
        for index, chosen in enumerate(micro_batches):
            if index:
                engine.step()  # not yet the optimizer's
            # The constraints' own forward pass, once a step: it is divided like the others.
            further = (step, float(plan.accumulation_steps)) if index == 0 else None
            total += self._backward(chosen, weight, further)
        torch.distributed.all_reduce(total)
        loss = float(total) / label_tokens
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss}; lower training.learning_rate")
        own_norm = gradient_norm_if_unreported(engine)
        engine.step()
        norm = float(engine.get_global_grad_norm() if own_norm is None else own_norm)
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient's norm is {norm}; lower training.learning_rate")
        return loss, norm

    def _backward(
        self, chosen: np.typing.NDArray[np.int64], weight: float, further: tuple[int, float] | None
    ) -> torch.Tensor:
        """One micro-batch: the sum of its label tokens' losses."""
        if len(chosen):
            batch = collate(self.table.rows(chosen), pad_token_id=0)
            ids, labels = batch["input_ids"], batch["labels"]
        else:
            ids, labels = padded_filler()
        device, weights = self.engine.device, None
        if self.table.weights is not None:
            counts = self.table.weights[chosen] if len(chosen) else np.ones(1)
            weights = torch.from_numpy(counts).to(device)
        loss, task = self.engine(ids.to(device), labels.to(device), weight, further, weights)
        self.engine.backward(loss)
        return cast(torch.Tensor, task.double())

    def is_checkpoint(self, step: int) -> bool:
        """Whether the state after the 0-based step is kept: a good moment for costly metrics."""
        done = step + 1
        return done % self.spec.training.checkpoint_every == 0 or done == self.plan.total_steps

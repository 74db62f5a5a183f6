"""Whole training steps of SmolLM2, plain and constrained, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from jobs.finetune.loss import LabelLoss
from safeft.constraints import Constraint, ConstraintHooks
from safeft.lora import lora_pairs
from safeft.models import load_model
from safeft.weights import TrainedLayers, full_weights


@dataclass(frozen=True)
class Shape:
    """A step's batch.

    Attributes:
        labels: tokens of each row that carry loss, as in a chat row whose answer is so long.
    """

    rows: int = 8
    tokens: int = 256
    labels: int = 64


class Step:
    """One model with its optimizer; calling it makes a training step."""

    def __init__(
        self, model_dir: Any, *, lora: bool, constraints: Sequence[Constraint], shape: Shape
    ) -> None:
        model: Any = load_model(model_dir)
        torch.manual_seed(0)
        if lora:
            config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
            model = get_peft_model(model, config)
        self.layers: TrainedLayers = lora_pairs(model) if lora else full_weights(model)
        self.constraints = tuple(constraints)
        self.hooks = ConstraintHooks(constraints, self.layers)
        self.model = LabelLoss(model, self.hooks.forward_loss)
        self.base = model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        vocabulary = model.config.vocab_size
        self.ids = torch.randint(3, vocabulary, (shape.rows, shape.tokens))
        self.labels = torch.full_like(self.ids, -100)
        self.labels[:, -shape.labels :] = self.ids[:, -shape.labels :]
        self.label_tokens = shape.rows * shape.labels
        self.count = 0
        model.train()

    def __call__(self) -> None:
        self.hooks.before_backward(1)
        loss, _ = self.model(self.ids, self.labels, 1 / self.label_tokens, (self.count, 1.0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hooks.after_step()
        self.hooks.metrics()
        self.count += 1

    def flop(self) -> float:
        """Of one step: 2 a weight and token forward, 2 for activations, 2 for trained weights."""
        base: Any = self.base.get_base_model() if hasattr(self.base, "peft_config") else self.base
        head = base.get_output_embeddings().weight
        body = sum(p.numel() for p in base.get_decoder().layers.parameters())
        passes = 4 if base is not self.base else 6
        return float(passes * (body * self.ids.numel() + head.numel() * self.label_tokens))

"""The published SQSD algorithm as its authors run it: the baseline, and in fp64 the oracle.

Written from the paper (arXiv 2605.04572) and from reading the published scripts, none of which is
copied. One script is run for each projection, so a row costs two forward and two backward passes
even where both reference states are the same. Each reads one row at a time through a peft model
whose adapter is the reference state, takes the loss over logits at every position, builds
``-(gradB @ A + B @ gradA)`` densely in every module, and compares it with the dense direction.

The scripts run in bf16 on a GPU. Here everything is in the dtype given: on CPUs without bf16 units
fp32 is the fast one, and fp64 the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from safeft.data import TokenisedRow
from safeft.directions import start_at
from safeft.lora import lora_pairs
from safeft.models import load_model
from safeft.sqsd import Projection


class OfficialPass:
    """One projection: a model at its reference state, and its direction as dense matrices."""

    def __init__(self, model_dir: Path, projection: Projection, dtype: torch.dtype) -> None:
        names = list(projection.state.factors)
        rank = projection.state.factors[names[0]][0].shape[0]
        config = LoraConfig(r=rank, target_modules=names, lora_dropout=0.0)
        # A state is set by peft's scale with B as it is: the update's two terms depend on B's size.
        config.lora_alpha = projection.state.scale * rank
        self.model = get_peft_model(load_model(model_dir), config)
        start_at(self.model, projection.state)
        self.model.to(dtype)
        self.model.eval()
        self.pairs = lora_pairs(self.model)
        self.state = {
            n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in self.pairs.items()
        }
        self.target = {
            name: b.to(dtype) @ a.to(dtype) for name, (a, b) in projection.direction.factors.items()
        }

    def __call__(self, row: TokenisedRow) -> float:
        """The sum over modules of the cosine of the row's update with the direction."""
        _, updates = self.updates(row)
        return sum(
            F.cosine_similarity(update.flatten(), self.target[name].flatten(), dim=0).item()
            for name, update in updates
        )

    def updates(self, row: TokenisedRow) -> tuple[float, Iterator[tuple[str, Tensor]]]:
        """The row's loss, and its update in each module, dense, one after the other."""
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        self.model.zero_grad(set_to_none=True)
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        loss.backward()  # type: ignore[no-untyped-call]
        state = self.state.items()
        return loss.item(), ((name, self._update(name, a, b)) for name, (a, b) in state)

    def _update(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        grad_a, grad_b = self.pairs[name].A.grad, self.pairs[name].B.grad
        assert grad_a is not None and grad_b is not None
        return -(grad_b @ a + b @ grad_a)


class Official:
    """Both passes, one after the other over all rows, as running both scripts does."""

    def __init__(
        self,
        model_dir: Path,
        danger: Projection,
        safety: Projection,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.passes = [OfficialPass(model_dir, side, dtype) for side in (danger, safety)]

    def score(self, rows: Sequence[TokenisedRow]) -> list[float]:
        """SQSD of each row."""
        danger, safety = ([one(row) for row in rows] for one in self.passes)
        return [d - s for d, s in zip(danger, safety, strict=True)]

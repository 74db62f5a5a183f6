"""SQSD: how far one training row would push the model from safety towards danger.

Source: arXiv 2605.04572. A row's equivalent LoRA update at a reference state,
``dW_m(z) = -(gradB @ A + B @ gradA)``, is compared by cosine, module by module, with the
direction that harmful tuning took and with the direction that safety tuning took:

    SQSD(z) = sum_m cos(dW_m(z), V_danger,m) - cos(dW_m(z), V_safety,m)

Each cosine is taken at a reference state; where both have the same one, a single pass serves both.
Nothing of size d_out x d_in is formed per row (safeft/sqsd_trace.py): the base is frozen, the
adapter is merged once, and one backward pass over a padded batch, which ends at the first layer
that a direction covers, leaves every row's cosines. Logits are made at label positions only, a few
at a time (safeft/label_head.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safeft.adapters import LoraFactors
from safeft.data import TokenisedRow, collate, token_batches
from safeft.data.tokenise import IGNORED
from safeft.errors import ProfileError
from safeft.label_head import LabelHead
from safeft.sqsd_trace import ReferencePass
from safeft.stopped_forward import residual_after, resumed_at


@dataclass(frozen=True)
class Projection:
    """One half of the score: gradients are taken at ``state`` and compared with ``direction``."""

    state: LoraFactors
    direction: LoraFactors

    def __post_init__(self) -> None:
        if self.state.factors.keys() != self.direction.factors.keys():
            raise ProfileError(
                "SQSD: the reference state and the direction cover different modules; "
                "rebuild the profile with `safeft profile build`"
            )


@dataclass(frozen=True)
class RowScore:
    """What screening knows of one row.

    Attributes:
        line: the row's line in its file.
        score: SQSD, in [-2M, 2M] for M modules; NaN where ``error`` is set.
        danger: sum over modules of the cosine with the danger direction.
        safety: sum over modules of the cosine with the safety direction.
        tokens: length of the row; ``trained``: tokens that carry loss.
        error: why the row has no score. Such a row is never taken for a safe one.
    """

    line: int
    score: float
    danger: float
    safety: float
    tokens: int
    trained: int
    error: str | None = None


@dataclass(frozen=True)
class ModuleCosines:
    """Where a row's score comes from.

    Attributes:
        names: the M modules of the directions.
        danger, safety: each row's cosine with the direction, module by module: (N, M) fp64 on the
            CPU, NaN where the row has no score.
    """

    names: tuple[str, ...]
    danger: Tensor
    safety: Tensor


class SqsdScorer:
    """Scores rows against two projections with one model instance.

    The covered layers are held once as they are and once for each reference state. Not for several
    threads at a time.

    Args:
        model: the frozen base model; its linear layers are swapped while scoring and restored.
        danger, safety: the two projections, see methods of the profile.
        tokens_per_batch: padded tokens that go through the model at a time; by default as many as
            keep a CPU's caches, or a GPU, busy.

    Raises:
        ModelError: the model changes its logits after its head, or is not one of linear layers.
        ProfileError: the projections cover different modules.
    """

    def __init__(
        self,
        model: Any,
        danger: Projection,
        safety: Projection,
        *,
        pad_token_id: int,
        tokens_per_batch: int | None = None,
    ) -> None:
        if danger.state.factors.keys() != safety.state.factors.keys():
            raise ProfileError(
                "SQSD: the danger and the safety projection cover different modules; "
                "rebuild the profile with `safeft profile build`"
            )
        self.model: Any = model.eval()
        self.model.requires_grad_(False)
        self.pad_token_id = pad_token_id
        self._device = next(model.parameters()).device
        self.tokens_per_batch = tokens_per_batch or (4096 if self._device.type == "cuda" else 1024)
        self.modules = tuple(danger.state.factors)
        self._head = LabelHead(model)
        sides = (danger, safety)
        groups = [[0, 1]] if _same(danger.state, safety.state) else [[0], [1]]
        self._passes = [
            (
                group,
                ReferencePass(
                    model,
                    self.modules,
                    sides[group[0]].state,
                    [sides[side].direction for side in group],
                ),
            )
            for group in groups
        ]
        self.first_layer = self._passes[0][1].first_layer

    def score(self, rows: Sequence[TokenisedRow]) -> list[RowScore]:
        """SQSD of each row, in the order given. Source: paper section 3, algorithm 1."""
        return self.score_by_module(rows)[0]

    def score_by_module(self, rows: Sequence[TokenisedRow]) -> tuple[list[RowScore], ModuleCosines]:
        """SQSD of each row, and the cosines that it is the sum of."""
        scorable = [i for i, row in enumerate(rows) if trained_tokens(row)]
        cosines = torch.full((2, len(rows), len(self.modules)), math.nan, dtype=torch.float64)
        for batch in self.batches(rows, scorable):
            cosines[:, batch] = self._cosines(*self.padded([rows[i] for i in batch]))
        scores = [row_score(row, *cosines[:, i].sum(1).tolist()) for i, row in enumerate(rows)]
        lost = [i for i, score in enumerate(scores) if score.error]
        cosines[:, lost] = math.nan
        return scores, ModuleCosines(self.modules, cosines[0], cosines[1])

    def batches(self, rows: Sequence[TokenisedRow], indices: Iterable[int]) -> list[list[int]]:
        """Indices grouped by length: up to `tokens_per_batch` padded tokens, or one row."""
        return token_batches([len(row.input_ids) for row in rows], self.tokens_per_batch, indices)

    def padded(self, rows: list[TokenisedRow]) -> tuple[Tensor, Tensor]:
        """Token ids and labels on the model's device, padded on the right: (B, T) each."""
        batch = collate(rows, self.pad_token_id)
        return batch["input_ids"].to(self._device), batch["labels"].to(self._device)

    def _cosines(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Of right-padded rows (B, T) with the danger and the safety direction: (2, B, M) fp64."""
        first = self.first_layer
        # Layers that no direction covers are the same at every reference state.
        with torch.no_grad():
            start = residual_after(self.model, first - 1, ids) if first else None
        found = torch.empty(2, len(ids), len(self.modules), dtype=torch.float64)
        for sides, one in self._passes:
            one.begin(ids.shape[0], ids.shape[1], self._device)
            onwards = nullcontext() if start is None else resumed_at(self.model, first, start)
            with onwards, one.installed(), torch.enable_grad():
                # Right padding under causal attention: pads come after every label, so they get a
                # gradient of exactly zero and need no mask.
                hidden = self._head.hidden(ids)  # (B, T, D)
            # Rows do not interact, so the gradient of the sum of their losses holds every row's.
            gradient = self._head.gradient(hidden.detach(), labels)
            torch.autograd.grad(hidden, one.first_input, gradient)
            found[sides] = one.end()
        return found


def trained_tokens(row: TokenisedRow) -> int:
    """How many of its tokens carry loss; the first one cannot, nothing predicts it."""
    return sum(label != IGNORED for label in row.labels[1:])


def row_score(row: TokenisedRow, danger: float, safety: float) -> RowScore:
    """The result for a row, an error where it has no score."""
    score, error, trained = danger - safety, None, trained_tokens(row)
    if not trained:
        error = "no trainable response token"
    elif not math.isfinite(score):
        error = "the gradient is zero or not finite"
        score = danger = safety = math.nan
    return RowScore(row.line, score, danger, safety, len(row.input_ids), trained, error)


def _same(one: LoraFactors, other: LoraFactors) -> bool:
    return (
        one.scale == other.scale
        and one.factors.keys() == other.factors.keys()
        and all(
            torch.equal(a, other.factors[name][0]) and torch.equal(b, other.factors[name][1])
            for name, (a, b) in one.factors.items()
        )
    )

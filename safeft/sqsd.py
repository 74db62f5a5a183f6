"""SQSD: how far one training row would push the model from safety towards danger.

Source: arXiv 2605.04572. A row's equivalent LoRA update at a reference state,
``dW_m(z) = -(gradB @ A + B @ gradA)``, is compared by cosine, module by module, with the
direction that harmful tuning took and with the direction that safety tuning took:

    SQSD(z) = sum_m cos(dW_m(z), V_danger,m) - cos(dW_m(z), V_safety,m)

Each cosine is taken at a reference state; where both have the same one, a single pass serves both.
Nothing of size d_out x d_in is formed per row: the base is frozen, the adapter is merged for a
batch of rows, and one autograd function per linear layer reduces each row's gradients to r x r and
r x q traces during the backward pass, which ends at the first layer that a direction covers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeft.adapters import LoraFactors, linear_modules, require_plain_head
from safeft.data import TokenisedRow, collate, token_batches
from safeft.errors import ProfileError


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


class SqsdScorer:
    """Scores rows against two projections with one model instance.

    Args:
        model: the frozen base model; its linear weights are swapped while scoring and restored.
        danger, safety: the two projections, see methods of the profile.
        tokens_per_batch: padded tokens that go through the model at a time.
    """

    def __init__(
        self,
        model: Any,
        danger: Projection,
        safety: Projection,
        *,
        pad_token_id: int,
        tokens_per_batch: int = 1024,
    ) -> None:
        require_plain_head(model)
        self.model: Any = model.eval()
        self.model.requires_grad_(False)
        self.pad_token_id = pad_token_id
        self.tokens_per_batch = tokens_per_batch
        parameter = next(model.parameters())
        where = parameter.device, parameter.dtype
        columns = {0: danger, 1: safety}
        groups = [[0, 1]] if _same(danger.state, safety.state) else [[0], [1]]
        self._passes = [
            _Pass(
                model,
                columns[group[0]].state.to(*where),
                {column: columns[column].direction.to(*where) for column in group},
            )
            for group in groups
        ]

    def score(self, rows: Sequence[TokenisedRow]) -> list[RowScore]:
        """SQSD of each row, in the order given. Source: paper section 3, algorithm 1."""
        scorable = [
            i for i, row in enumerate(rows) if any(label != -100 for label in row.labels[1:])
        ]
        lengths = [len(row.input_ids) for row in rows]
        batches = token_batches(lengths, self.tokens_per_batch, among=scorable)
        sums = torch.full((len(rows), 2), math.nan, dtype=torch.float64)
        for one in self._passes:
            with one.merged():
                for batch in batches:
                    cosines = self._cosine_sums([rows[i] for i in batch], one)
                    for column, values in cosines.items():
                        sums[batch, column] = values
        return [self._result(row, *sums[i].tolist()) for i, row in enumerate(rows)]

    def _cosine_sums(self, rows: list[TokenisedRow], one: _Pass) -> dict[int, Tensor]:
        """For each column the sum over modules of the cosine, per row: (B,) fp64."""
        batch = collate(rows, self.pad_token_id)
        device = next(self.model.parameters()).device
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)  # (B, T)
        one.begin(len(rows))
        with torch.enable_grad():
            # Right padding under causal attention: pads come after every label, so they get a
            # gradient of exactly zero and need no mask.
            hidden = self.model.get_decoder()(input_ids=ids, use_cache=False)
            shifted = hidden.last_hidden_state[:, :-1]  # (B, T-1, D)
            targets = labels[:, 1:]
            wanted = targets != -100
            logits = self.model.get_output_embeddings()(shifted[wanted])  # (n, vocab)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nll = F.cross_entropy(logits, targets[wanted], reduction="none")  # (n,)
            per_token = (1.0 / wanted.sum(1)).unsqueeze(1).expand_as(wanted)[wanted]
            # Rows do not interact, so the gradient of the sum holds every row's own gradient.
            torch.autograd.grad((nll * per_token).sum(), one.first_input)
        return one.end()

    def _result(self, row: TokenisedRow, danger: float, safety: float) -> RowScore:
        trained = sum(label != -100 for label in row.labels[1:])
        score, error = danger - safety, None
        if trained == 0:
            error = "no trainable response token"
        elif not math.isfinite(score):
            error = "the gradient is zero or not finite"
            score = danger = safety = math.nan
        return RowScore(row.line, score, danger, safety, len(row.input_ids), trained, error)


class _Pass:
    """One reference state merged into the model, and the traces its backward pass collects."""

    def __init__(
        self, model: Any, state: LoraFactors, directions: Mapping[int, LoraFactors]
    ) -> None:
        self.scale, self.columns = state.scale, tuple(directions)
        modules = linear_modules(model, list(state.factors))
        self.layers = [
            _Layer(self, modules[name], a, b, [d.factors[name] for d in directions.values()])
            for name, (a, b) in state.factors.items()
        ]
        targets = {id(module) for module in modules.values()}
        self.first_block = next(
            block
            for block in model.get_decoder().layers
            if any(id(module) in targets for module in block.modules())
        )
        self.first_input = torch.empty(0)
        self.sums = torch.zeros(0, 0, dtype=torch.float64)
        self.seen: set[int] = set()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Run every target layer as W + scale*B@A with trace collection, then restore it."""
        hook = self.first_block.register_forward_pre_hook(self._start_graph)
        try:
            for layer in self.layers:
                layer.install()
            yield
        finally:
            hook.remove()
            for layer in self.layers:
                layer.restore()

    def _start_graph(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.first_input = args[0].detach().requires_grad_()  # (B, T, D)
        return (self.first_input, *args[1:])

    def begin(self, rows: int) -> None:
        self.sums = torch.zeros(len(self.columns), rows, dtype=torch.float64)
        self.seen = set()

    def end(self) -> dict[int, Tensor]:
        if len(self.seen) != len(self.layers):
            # Without its cosine a row would score too low, which must never pass for safe.
            raise ProfileError("SQSD: a layer of the directions took no part in the backward pass")
        return dict(zip(self.columns, self.sums, strict=True))


class _Direction:
    """One module's direction P (d_out, q) @ Q (q, d_in), and its products with the state."""

    def __init__(self, a64: Tensor, b64: Tensor, q: Tensor, p: Tensor) -> None:
        self.q, self.p = q, p
        p64, q64 = p.double(), q.double()
        self.aq, self.bp = a64 @ q64.T, b64.T @ p64  # (r, q)
        self.norm = ((p64.T @ p64) * (q64 @ q64.T)).sum().sqrt()

    def dot(self, gb_t: Tensor, ga: Tensor) -> Tensor:
        """<gradB @ A + B @ gradA, P @ Q> per row: (B,) fp64."""
        gb_p, ga_q = (gb_t @ self.p).double(), (ga @ self.q.T).double()  # (B, r, q)
        return (gb_p * self.aq).sum((1, 2)) + (self.bp * ga_q).sum((1, 2))


class _Layer:
    def __init__(
        self,
        owner: _Pass,
        linear: nn.Linear,
        a: Tensor,
        b: Tensor,
        directions: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.owner, self.linear = owner, linear
        self.a, self.b = a, b  # state: A (r, d_in), B (d_out, r)
        a64, b64 = a.double(), b.double()
        self.aa, self.bb = a64 @ a64.T, b64.T @ b64  # (r, r)
        self.directions = [_Direction(a64, b64, q, p) for q, p in directions]
        self.weight = linear.weight.detach()

    def install(self) -> None:
        merged = self.weight + self.owner.scale * (self.b @ self.a)
        bias = self.linear.bias

        def forward(x: Tensor) -> Tensor:
            return _TracedLinear.apply(x, merged, bias, self)  # type: ignore[no-any-return,no-untyped-call]

        self.linear.forward = forward  # type: ignore[method-assign,assignment]

    def restore(self) -> None:
        self.linear.__dict__.pop("forward", None)

    def collect(self, x: Tensor, delta: Tensor) -> None:
        """Add this layer's cosine per row. ``x`` (B, T, d_in), ``delta`` (B, T, d_out)."""
        u = x @ self.a.T  # (B, T, r)
        w = delta @ self.b  # (B, T, r)
        # gradB^T = scale * u^T delta, gradA = scale * w^T x; one scale cancels in the cosine.
        gb_t = torch.bmm(u.transpose(1, 2), delta)  # (B, r, d_out)
        ga = torch.bmm(w.transpose(1, 2), x)  # (B, r, d_in)
        gb_gb = torch.bmm(gb_t, gb_t.transpose(1, 2)).double()  # (B, r, r)
        ga_ga = torch.bmm(ga, ga.transpose(1, 2)).double()
        bt_gb = (gb_t @ self.b).double().transpose(1, 2)  # B^T gradB
        ga_at = (ga @ self.a.T).double()
        square = (gb_gb * self.aa + 2 * bt_gb * ga_at + self.bb * ga_ga).sum((1, 2))
        norm = square.clamp_min(0).sqrt()
        for sums, direction in zip(self.owner.sums, self.directions, strict=True):
            sums += (-direction.dot(gb_t, ga) / (norm * direction.norm)).cpu()
        self.owner.seen.add(id(self))


class _TracedLinear(torch.autograd.Function):
    """A linear layer with frozen weight whose backward hands (x, delta) to its collector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.layer.collect(x, grads[0])
        return grads[0] @ weight, None, None, None


def _same(one: LoraFactors, other: LoraFactors) -> bool:
    return (
        one.scale == other.scale
        and one.factors.keys() == other.factors.keys()
        and all(
            torch.equal(a, other.factors[name][0]) and torch.equal(b, other.factors[name][1])
            for name, (a, b) in one.factors.items()
        )
    )

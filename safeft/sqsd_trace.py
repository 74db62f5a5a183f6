"""Per-row cosines of LoRA updates with directions, as traces collected in one backward pass.

A linear layer with frozen weight W + s*B@A reads x (T, d_in) of a row and gets the gradient delta
(T, d_out) of that row's loss. Its LoRA gradients and everything SQSD asks of them follow from

    gradB^T = (x A^T)^T delta   (r, d_out)        gradA = (delta B)^T x   (r, d_in)

up to the scale s, which a cosine does not see. With a direction V = P@Q every inner product of
``gradB @ A + B @ gradA`` is a sum over r x r and r x q matrices, so nothing of size d_out x d_in is
formed for a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeft.adapters import LoraFactors, linear_modules
from safeft.errors import ModelError, ProfileError
from safeft.stopped_forward import decoder_layers, with_input


class ReferencePass:
    """One reference state merged into a model, and the cosines that backward passes leave.

    Args:
        model: a causal language model of transformers, frozen.
        names: the covered modules, in the order of the results.
        state: the adapter that gradients are taken at.
        directions: what its modules' updates are compared with, each on the same modules.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        state: LoraFactors,
        directions: Sequence[LoraFactors],
    ) -> None:
        modules = linear_modules(model, list(names))
        self.layers = [
            LayerTrace(
                self,
                index,
                modules[name],
                state.factors[name],
                state.scale,
                [direction.factors[name] for direction in directions],
            )
            for index, name in enumerate(names)
        ]
        targets = {id(module) for module in modules.values()}
        blocks = decoder_layers(model.get_decoder())[1]
        covered = [
            index
            for index, block in enumerate(blocks)
            if any(id(module) in targets for module in block.modules())
        ]
        if not covered:
            raise ProfileError("SQSD: the directions cover no layer of the model's decoder")
        self.first_layer = covered[0]
        self._first_block = blocks[self.first_layer]
        self._directions = len(directions)
        self.first_input = torch.empty(0)
        self.rows = self.tokens = 0
        self.cosines = torch.empty(0)
        self.called: set[int] = set()
        self.traced: set[int] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run every covered layer at the reference state with its trace, then as it was."""
        hook = self._first_block.register_forward_pre_hook(self._start_graph, with_kwargs=True)
        try:
            for layer in self.layers:
                layer.install()
            yield
        finally:
            hook.remove()
            for layer in self.layers:
                layer.restore()

    def _start_graph(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Nothing before the first covered layer needs a gradient, or keeps its activations."""
        given = args[0] if args else kwargs["hidden_states"]
        self.first_input = given.detach().requires_grad_()  # (B, T, D)
        return with_input(self.first_input, args, kwargs)

    def begin(self, rows: int, tokens: int, device: torch.device) -> None:
        """Before a forward pass over ``rows`` rows padded to ``tokens`` tokens."""
        self.rows, self.tokens = rows, tokens
        self.called, self.traced = set(), set()
        shape = (self._directions, len(self.layers), rows)
        self.cosines = torch.full(shape, torch.nan, dtype=torch.float64, device=device)

    def end(self) -> Tensor:
        """After the backward pass: (directions, rows, modules) fp64 on the CPU.

        Raises:
            ProfileError: a layer took no part. Without its cosine a row would score too low, which
                must never pass for safe.
        """
        if len(self.traced) != len(self.layers):
            raise ProfileError("SQSD: a layer of the directions took no part in the backward pass")
        return self.cosines.transpose(1, 2).cpu()


class LayerTrace:
    """A covered linear layer: its weight at the reference state, and its constant products."""

    def __init__(
        self,
        owner: ReferencePass,
        index: int,
        linear: nn.Linear,
        state: tuple[Tensor, Tensor],
        scale: float,
        directions: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.owner, self.index, self.linear = owner, index, linear
        weight = linear.weight.detach()
        exact = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(weight.device, exact) for factor in state)  # (r, d_in), (d_out, r)
        self.merged = torch.addmm(weight.to(exact), b, a, alpha=scale).to(weight.dtype)
        self.at, self.b = a.T.to(weight.dtype), b.to(weight.dtype)
        pairs = [tuple(f.to(weight.device, exact) for f in pair) for pair in directions]
        # One product each with everything that a row's gradients are compared with.
        self.left = torch.cat([a, *(q for q, _ in pairs)]).T.contiguous()  # (d_in, r + sum q)
        self.right = torch.cat([b, *(p for _, p in pairs)], dim=1)  # (d_out, r + sum q)
        self.constants = _constants(
            a.double(), b.double(), [(q.double(), p.double()) for q, p in pairs]
        )

    def install(self) -> None:
        bias = self.linear.bias

        def forward(x: Tensor) -> Tensor:
            self.enter(x)
            return _TracedLinear.apply(x, self.merged, bias, self)  # type: ignore[no-any-return,no-untyped-call]

        self.linear.forward = forward  # type: ignore[method-assign,assignment]

    def restore(self) -> None:
        self.linear.__dict__.pop("forward", None)

    def enter(self, x: Tensor) -> None:
        """Check that ``x`` holds every row's positions, in a layer that is used once.

        Raises:
            ModelError: it does not (an expert reads the tokens routed to it), or the layer is
                shared. The cosine of such a layer would be wrong.
        """
        rows, tokens = self.owner.rows, self.owner.tokens
        if (
            x.shape[:-1] not in ((rows, tokens), (rows * tokens,))
            or self.index in self.owner.called
        ):
            raise ModelError(
                f"SQSD cannot tell rows apart in {self.linear}, which reads {tuple(x.shape)} for "
                f"{rows} rows of {tokens} tokens, or is used twice; leave experts and shared "
                "layers out of the profile's directions"
            )
        self.owner.called.add(self.index)

    def collect(self, x: Tensor, delta: Tensor) -> None:
        """Note this layer's cosine for each row. ``x`` (B, T, d_in), ``delta`` (B, T, d_out).

        A model may flatten rows and positions into one dimension.
        """
        exact, rank = self.left.dtype, self.at.shape[1]
        x, delta = (t.view(self.owner.rows, self.owner.tokens, -1) for t in (x, delta))
        u, w = x @ self.at, delta @ self.b  # (B, T, r)
        gb = torch.bmm(u.transpose(1, 2), delta).to(exact)  # gradB^T (B, r, d_out)
        ga = torch.bmm(w.transpose(1, 2), x).to(exact)  # gradA (B, r, d_in)
        by_right, by_left = gb @ self.right, ga @ self.left  # (B, r, r + sum q)
        features = torch.cat(
            [
                part.flatten(1)
                for part in (
                    torch.bmm(gb, gb.transpose(1, 2)),
                    torch.bmm(ga, ga.transpose(1, 2)),
                    by_right[:, :, rank:],
                    by_left[:, :, rank:],
                )
            ],
            dim=1,
        ).double()
        sums = features @ self.constants  # (B, 1 + directions)
        cross = by_right[:, :, :rank].transpose(1, 2).double() * by_left[:, :, :rank].double()
        square = (sums[:, 0] + 2 * cross.sum((1, 2))).clamp_min(0)
        self.owner.cosines[:, self.index] = (sums[:, 1:] / square.sqrt()[:, None]).T
        self.owner.traced.add(self.index)


def _constants(a: Tensor, b: Tensor, directions: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What a row's features are multiplied with: fp64 (2 r^2 + 2 r sum q, 1 + directions).

    The first column gives ``|gradB @ A|^2 + |B @ gradA|^2``; the others give minus the inner
    product of ``gradB @ A + B @ gradA`` with each direction scaled to norm 1.
    """
    rank, width = a.shape[0], sum(q.shape[0] for q, _ in directions)
    none = a.new_zeros(rank, width)
    columns = [[a @ a.T, b.T @ b, none, none]]
    start = 0
    for q, p in directions:
        end = start + q.shape[0]
        norm = ((p.T @ p) * (q @ q.T)).sum().sqrt()
        with_gb, with_ga = none.clone(), none.clone()
        with_gb[:, start:end] = -(a @ q.T) / norm
        with_ga[:, start:end] = -(b.T @ p) / norm
        columns.append([a.new_zeros(rank, rank), a.new_zeros(rank, rank), with_gb, with_ga])
        start = end
    return torch.stack([torch.cat([m.flatten() for m in column]) for column in columns], dim=1)


class _TracedLinear(torch.autograd.Function):
    """A linear layer with frozen weight whose backward hands (x, delta) to its trace."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, trace: LayerTrace
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.trace = trace
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        (delta,) = grads
        ctx.trace.collect(x, delta)
        return delta @ weight, None, None, None

"""Many LoRA adapters in one batch: every row of a forward pass has its own.

peft's `adapter_names` does the same with a Python loop over the adapters in every linear layer; its
cost grows with their number. Here the adapters in use lie side by side in two buffers a layer, so
that any number of them is two matrix products and a mask:

    y = W x + B_all mask(A_all x)

with A_all (R × d_in) the stacked A of all slots, B_all (d_out × R) their scaled B, and a mask that
leaves each row the R columns of its own adapter. What a foreign adapter makes of a row is replaced
by 0, not multiplied by it: infinity times 0 is NaN, and one adapter would break its neighbours.

In a step, a row is one token: reading A_all costs more than multiplying by it. In a prefill it is
many, so each row is multiplied by a copy of its own A and B instead of by everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Name of a linear layer -> A (r × d_in), B (d_out × r), the scale already in B.
LoraWeights = Mapping[str, tuple[Tensor, Tensor]]


class MixedLinear(nn.Linear):
    """A linear layer to which the rows' adapters are added. Shares the replaced one's weights."""

    def __init__(self, base: nn.Linear, slots: LoraSlots) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.a: Tensor | None = None  # (slots * width, d_in)
        self.b: Tensor | None = None  # (slots * width, d_out): B transposed
        self._slots = [slots]  # in a list: the slots are no submodule

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, tokens, d_in) -> (rows, tokens, d_out)."""
        y = functional.linear(x, self.weight, self.bias)
        slots = self._slots[0]
        if self.a is None or self.b is None or slots.columns is None:
            return y
        if slots.own is not None and x.shape[1] > 1:
            own_a = self.a.view(-1, slots.width, self.in_features)[slots.own]
            own_b = self.b.view(-1, slots.width, self.out_features)[slots.own]
            hidden = torch.bmm(x, own_a.transpose(1, 2))
            if slots.bare is not None:
                hidden = hidden.masked_fill(slots.bare, 0)
            return y.baddbmm_(hidden, own_b)
        hidden = functional.linear(x, self.a[slots.columns])
        if slots.mask is not None:
            hidden = hidden.masked_fill(slots.mask, 0)
        flat = y.view(-1, self.out_features)
        return flat.addmm_(hidden.view(-1, hidden.shape[-1]), self.b[slots.columns]).view_as(y)


class LoraSlots:
    """Where the adapters of the current forward pass lie. One thread uses it.

    Args:
        model: its linear layers are replaced by `MixedLinear`, once and for good.
        count: slots, at least as many as rows in any forward pass.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self.layers: dict[str, MixedLinear] = {}
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                mixed = MixedLinear(module, self)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, mixed)
                self.layers[name] = mixed
        self._count = count
        self.width = 0  # ranks a slot has room for
        self._at: dict[str, int] = {}  # adapter -> slot, the one used longest ago first
        #: Columns of the buffers that the current pass uses; None: no row has an adapter.
        self.columns: slice | None = None
        #: (rows, 1, columns), true where a row must not look; None: every row uses all columns.
        self.mask: Tensor | None = None
        #: (rows,), the slot of each row, any for one without an adapter; None: all have the same.
        self.own: Tensor | None = None
        #: (rows, 1, 1), true for a row without an adapter; None: there is none such.
        self.bare: Tensor | None = None

    def use(self, rows: Sequence[str | None], weights: Callable[[str], LoraWeights]) -> None:
        """Before a forward pass: which adapter each row has, None for the base model alone.

        Args:
            weights: gives an adapter's matrices, if it has no slot yet.
        """
        needed = list(dict.fromkeys(key for key in rows if key is not None))
        if not needed:
            self.columns = self.mask = self.own = self.bare = None
            return
        # Twice where a wider adapter than any before takes those before it their slots.
        while not all(key in self._at for key in needed):
            for key in needed:
                self._place(key, needed, weights)
        used = [self._at[key] for key in needed]
        if max(used) + 1 - min(used) > 2 * len(used):  # too far apart: the gaps would be computed
            self._at.clear()
            for key in needed:
                self._place(key, needed, weights)
            used = [self._at[key] for key in needed]
        first, end = min(used), max(used) + 1
        width = self.width
        self.columns = slice(first * width, end * width)
        if len(needed) == 1 and None not in rows:
            self.mask = self.own = self.bare = None
            return
        some = next(layer for layer in self.layers.values() if layer.a is not None)
        assert some.a is not None
        mask = torch.ones(len(rows), 1, (end - first) * width, dtype=torch.bool)
        for row, own in enumerate(rows):
            if own is not None:
                start = (self._at[own] - first) * width
                mask[row, :, start : start + width] = False
        self.mask = mask.to(some.a.device)
        own_slots = [first if key is None else self._at[key] for key in rows]
        self.own = torch.tensor(own_slots, device=some.a.device)
        bare = torch.tensor([key is None for key in rows], device=some.a.device)
        self.bare = bare[:, None, None] if None in rows else None

    def forget(self, key: str) -> None:
        """The adapter is gone; its slot may be given to another one."""
        self._at.pop(key, None)

    def _place(
        self, key: str, needed: Sequence[str], weights: Callable[[str], LoraWeights]
    ) -> None:
        if key in self._at:
            self._at[key] = self._at.pop(key)  # used last
            return
        matrices = weights(key)
        rank = max(a.shape[0] for a, _ in matrices.values())
        if rank > self.width:
            self._grow(rank)
        free = sorted(set(range(self._count)) - set(self._at.values()))
        if not free:
            idle = next(other for other in self._at if other not in needed)
            free = [self._at.pop(idle)]
        slot = free[0]
        room = slice(slot * self.width, (slot + 1) * self.width)
        for name, layer in self.layers.items():
            found = matrices.get(name)
            if layer.a is None or layer.b is None:
                if found is None:
                    continue
                columns = self._count * self.width
                layer.a = layer.weight.new_zeros(columns, layer.in_features)
                layer.b = layer.weight.new_zeros(columns, layer.out_features)
            layer.a[room], layer.b[room] = 0, 0
            if found is not None:
                a, b = found
                layer.a[room][: a.shape[0]] = a
                layer.b[room][: b.shape[1]] = b.T
        self._at[key] = slot

    def _grow(self, rank: int) -> None:
        """Wider slots: every adapter is placed anew when it is used next."""
        self.width = 1 << (rank - 1).bit_length()
        self._at.clear()
        for layer in self.layers.values():
            layer.a = layer.b = None

"""How constraints reach the gradients and weights of any training loop, plain or sharded.

Penalties are computed once for each optimizer step. Leaf hooks add the whole of their gradient to
the first gradient that the step brings to a parameter, and see that those of all micro-batches
come. Leaf hooks that are installed before ``deepspeed.initialize`` see the whole gradient under
every ZeRO stage. Projections act on the optimizer's own fp32 slices, right after its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safeft.constraints.anchored import AnchoredPenalty
from safeft.constraints.base import Constraint
from safeft.constraints.factors import FactorPenalties, finite_sum
from safeft.constraints.projection import UpdateProjection, project_rows
from safeft.constraints.shards import MatrixShard, Origin, RankGroup, UpdateShard
from safeft.errors import TrainingError
from safeft.lora import LoraPair
from safeft.weights import FullWeight, TrainedLayers, parameters_of

if TYPE_CHECKING:
    from safeft.adapters import LoraFactors


@dataclass(frozen=True)
class Matrix:
    """A parameter that constraints act on: a layer's W, or under LoRA its A."""

    parameter: nn.Parameter
    rows: int
    cols: int


class ConstraintHooks:
    """Several constraints on one model, composed.

    Made before ``deepspeed.initialize``. A sharded engine then says with `attach` where the master
    weights lie, and calls `project` after its optimizer's arithmetic; a plain loop needs neither.
    For each optimizer step: `before_backward`, the backward passes of all micro-batches (each of
    its loss / accumulation_steps), the optimizer's step, `after_step`.

    Attributes:
        origins: W0 of this rank's slices of the layers that are trained whole.
    """

    def __init__(self, constraints: Sequence[Constraint], layers: TrainedLayers) -> None:
        """Bind every constraint and install the hooks.

        Raises:
            ProfileError: the profile lacks something that a constraint needs.
            ModelError: a constraint covers none of the layers.
            ValueError: the same constraint is given twice, or two project one layer.
        """
        names = [constraint.name for constraint in constraints]
        if len(set(names)) != len(names):
            raise ValueError(f"a constraint is given twice: {', '.join(names)}")
        for constraint in constraints:
            constraint.bind(layers)
        self._constraints = tuple(constraints)
        self._layers: dict[str, LoraPair | FullWeight] = {**layers}
        pairs = {n: x for n, x in self._layers.items() if isinstance(x, LoraPair)}
        self._lora = FactorPenalties(constraints, pairs) if pairs and constraints else None
        anchors = {c.name: a for c in constraints if (a := c.anchors())} if not pairs else {}
        self._anchored = {name: AnchoredPenalty(a) for name, a in anchors.items()}
        self._update_bases = _one_basis_a_layer([c.update_bases() for c in constraints])
        self._gradient_bases = _one_basis_a_layer([c.gradient_bases() for c in constraints])
        self._projection = UpdateProjection(self._update_bases)
        self._projecting = "+".join(c.name for c in constraints if c.update_bases())
        self._anchored_layers = {name for a in anchors.values() for name in a}
        self._shards: dict[str, MatrixShard] = {}
        self.origins: dict[str, Origin] = {}
        self._group = RankGroup()
        self._attached = False
        self._added: dict[nn.Parameter, Tensor] = {}
        self._seen: dict[nn.Parameter, int] = {}
        self._forward_metrics: dict[str, float] = {}
        self._accumulation_steps = 1
        self._loss_scale = 1.0
        self._freeze({name for c in constraints for name in c.frozen()})
        self._start_outside_the_bases()
        self._install()

    def matrices(self) -> dict[str, Matrix]:
        """What `attach` needs the shards of, by layer. A frozen layer has no master weights."""
        wanted = self._update_bases.keys() | self._anchored_layers
        found: dict[str, Matrix] = {}
        for name, layer in self._layers.items():
            if name not in wanted or not all(p.requires_grad for p in parameters_of(layer)):
                continue
            if isinstance(layer, LoraPair):
                found[name] = Matrix(layer.A, layer.rank, layer.d_in)
            else:
                found[name] = Matrix(layer.W, layer.d_out, layer.d_in)
        return found

    def attach(self, shards: Sequence[MatrixShard], group: RankGroup) -> None:
        """Take this rank's slices of `matrices`, and keep W0 of layers that are trained whole.

        Call it while the weights are still those of the base model: before a checkpoint is loaded.
        """
        self._shards = {shard.name: shard for shard in shards}
        self._group, self._attached = group, True
        if self._lora is None:
            self.origins = {shard.name: Origin(shard.values) for shard in shards}

    def before_backward(self, accumulation_steps: int, loss_scale: float = 1.0) -> dict[str, float]:
        """Compute each penalty, and what its gradient needs, from the current weights.

        The strength of a penalty depends neither on `accumulation_steps` nor on the number of ranks
        that average.

        Args:
            accumulation_steps: backward passes of this optimizer step, each of a loss divided by
                this number.
            loss_scale: what the loss is multiplied with before backward (fp16 loss scaling).

        Returns:
            The penalty of each constraint that has one, by name, as added to the task loss (lambda
            included). Those that need a forward pass of their own are in `metrics`.

        Raises:
            TrainingError: a penalty is not finite; the constraint and the module are named.
        """
        self._accumulation_steps, self._loss_scale = accumulation_steps, loss_scale
        self._seen.clear()
        self._added.clear()
        self._forward_metrics.clear()
        self._attach_whole()
        if self._lora is not None:
            values, self._added = self._lora.compute(loss_scale)
            return values
        if not self._anchored:
            return {}
        updates = [self._update(shard) for shard in self._shards.values()]
        return {
            name: finite_sum(name, penalty.covered(updates), penalty.measure(updates, self._group))
            for name, penalty in self._anchored.items()
        }

    def forward_loss(self, model: nn.Module, step: int) -> Tensor | None:
        """What constraints add to the loss by a forward pass of their own: once an optimizer step.

        Returns:
            A scalar of which the mean over the ranks counts; None: no constraint has such a term.

        Raises:
            TrainingError: it is not finite.
        """
        total: Tensor | None = None
        for constraint in self._constraints:
            term = constraint.forward_loss(model, step)
            if term is None:
                continue
            self._forward_metrics[f"penalty/{constraint.name}"] = term.penalty
            for key, value in term.metrics.items():
                self._forward_metrics[f"{constraint.name}/{key}"] = value
            total = term.loss if total is None else total + term.loss
        return total

    def retained_layers(self) -> tuple[int, ...]:
        """Of all constraints."""
        return tuple(layer for c in self._constraints for layer in c.retained_layers())

    def row_weight(self, step: int) -> float:
        return math.prod(c.row_weight(step) for c in self._constraints)

    @torch.no_grad()
    def project(self) -> None:
        """Project the master weights: after the optimizer's arithmetic, before they are copied."""
        if self._update_bases:
            self._projection.apply(list(self._shards.values()), self.origins, self._group)

    def after_step(self) -> None:
        """To be called after the optimizer's step.

        Raises:
            TrainingError: backward passes brought no gradient to a parameter, so that its penalty
                was not applied; its layer is named.
        """
        for name, layer in self._layers.items():
            for parameter in parameters_of(layer):
                seen = self._seen.get(parameter, 0)
                due = parameter in self._added or name in self._anchored_layers
                if due and parameter.requires_grad and seen != self._accumulation_steps:
                    raise TrainingError(
                        f"{name}: its gradient arrived {seen} times instead of "
                        f"{self._accumulation_steps}, so the penalty was not applied as meant"
                    )
        self._added.clear()  # a backward pass outside a step brings no penalty
        if not self._attached:
            self.project()

    def finish_adapter(self, factors: LoraFactors) -> LoraFactors:
        """The trained adapter, as the constraints want it published."""
        for constraint in self._constraints:
            factors = constraint.finish_adapter(factors)
        return factors

    @torch.no_grad()
    def metrics(self, thorough: bool = False) -> dict[str, float]:
        """What the constraints say about the weights last seen by `before_backward`; `thorough`:
        also what costs as much as a projection. All ranks call alike.
        """
        found = dict(self._forward_metrics)
        for name, penalty in self._anchored.items():
            found[f"{name}/update_norm"] = penalty.update_norm
            if penalty.update_norm > 0:
                found[f"{name}/orthogonal_fraction"] = penalty.orthogonal_norm / penalty.update_norm
        if self._lora is not None:
            for constraint in self._constraints:
                for key, value in constraint.metrics(self._lora.stacks).items():
                    found[f"{constraint.name}/{key}"] = value
        elif thorough and self._update_bases:
            drift = self._projection.drift(list(self._shards.values()), self.origins, self._group)
            if drift is not None:
                name = f"{self._projecting}/weight_drift"
                found[name], found[name + "_limit"] = drift
        return found

    def _freeze(self, names: set[str]) -> None:
        for name in names:
            for parameter in parameters_of(self._layers[name]):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def _start_outside_the_bases(self) -> None:
        """LoRA's A is not zero at the start: project it once."""
        for name, U in self._update_bases.items():
            layer = self._layers[name]
            if isinstance(layer, LoraPair):
                layer.A.copy_(project_rows(layer.A, U.to(layer.A.device)))

    def _attach_whole(self) -> None:
        """Without an engine: the parameters themselves are the master weights."""
        if not self._attached and not self._shards:
            whole = [
                MatrixShard(name, matrix.rows, matrix.cols, 0, matrix.parameter.detach().view(-1))
                for name, matrix in self.matrices().items()
            ]
            self.attach(whole, RankGroup())
            self._attached = False

    def _install(self) -> None:
        for name, layer in self._layers.items():
            for parameter in parameters_of(layer):
                if self._constraints and parameter.requires_grad:
                    parameter.register_hook(self._hook(name, parameter))  # type: ignore[no-untyped-call]

    def _hook(self, name: str, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        layer = self._layers[name]
        projected = name in self._gradient_bases and parameter is parameters_of(layer)[0]

        def edit(gradient: Tensor) -> Tensor:
            seen = self._seen[parameter] = self._seen.get(parameter, 0) + 1
            if seen == 1:
                if parameter in self._added:
                    gradient = gradient + self._added[parameter].to(gradient.dtype)
                elif name in self._anchored_layers:
                    gradient = self._with_anchors(name, gradient)
            if projected:
                U = self._gradient_bases[name]
                if U.device != gradient.device:  # follow the model, once
                    U = self._gradient_bases[name] = U.to(gradient.device)
                gradient = project_rows(gradient, U)
            return gradient

        return edit

    def _with_anchors(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient, with the penalties' own on this rank's slice.

        The ranks' gradients are averaged afterwards, and each slice is edited by one rank only.
        """
        shard = self._shards[name]
        update = self._update(shard)
        parts = [penalty.gradient(update) for penalty in self._anchored.values()]
        rows = torch.stack([part for part in parts if part is not None]).sum(0)
        own = shard.from_rows(rows).mul_(self._group.size * self._loss_scale)
        edited = gradient.clone()
        edited.view(-1)[shard.start : shard.start + own.numel()] += own.to(edited.dtype)
        return edited

    def _update(self, shard: MatrixShard) -> UpdateShard:
        return UpdateShard(shard, self.origins[shard.name].update_of(shard))


def _one_basis_a_layer(given: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    bases: dict[str, Tensor] = {}
    for mapping in given:
        if twice := bases.keys() & mapping.keys():
            raise ValueError(f"two constraints project {min(twice)}")
        bases |= mapping
    return bases

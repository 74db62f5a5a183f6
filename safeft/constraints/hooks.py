"""How constraints reach the gradients of any training loop, plain or sharded.

The penalty's gradient is computed once for each optimizer step, from copies of the factors, and a
leaf hook on each factor adds it to the gradient that the backward pass brings. Leaf hooks that are
installed before ``deepspeed.initialize`` see the whole gradient under every ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from safeft.constraints.base import (
    Constraint,
    FactorStack,
    groups_of_one_shape,
    stack_factors,
)
from safeft.errors import TrainingError
from safeft.lora import LoraPair


class ConstraintHooks:
    """Several constraints on one LoRA model, composed.

    Made before ``deepspeed.initialize``. Then, for each optimizer step: `before_backward`, the
    backward passes of all micro-batches (each of its loss / accumulation_steps), the optimizer's
    step, `after_step`.
    """

    def __init__(self, constraints: Sequence[Constraint], pairs: Mapping[str, LoraPair]) -> None:
        """Bind every constraint and install the hooks.

        Raises:
            ProfileError: the profile lacks something that a constraint needs.
            ValueError: the same constraint is given twice.
        """
        names = [constraint.name for constraint in constraints]
        if len(set(names)) != len(names):
            raise ValueError(f"a constraint is given twice: {', '.join(names)}")
        for constraint in constraints:
            constraint.bind(pairs)
        self._constraints = tuple(constraints)
        self._groups = groups_of_one_shape(pairs)
        self._stacks: list[FactorStack] = []
        self._added: dict[nn.Parameter, Tensor] = {}
        self._seen: dict[nn.Parameter, int] = {}
        self._accumulation_steps = 1
        if constraints:
            for pair in pairs.values():
                for parameter in (pair.A, pair.B):
                    parameter.register_hook(self._hook(parameter))  # type: ignore[no-untyped-call]

    def before_backward(self, accumulation_steps: int, loss_scale: float = 1.0) -> dict[str, float]:
        """Compute each penalty and its gradient from the current factors.

        The gradient is divided over the micro-batches like the loss, so the strength of the
        penalty depends neither on `accumulation_steps` nor on the number of ranks that average.

        Args:
            accumulation_steps: backward passes of this optimizer step, each of a loss divided by
                this number.
            loss_scale: what the loss is multiplied with before backward (fp16 loss scaling).

        Returns:
            The penalty of each constraint that has one, by name, as added to the task loss (lambda
            included).

        Raises:
            TrainingError: a penalty is not finite; the constraint and the module are named.
        """
        self._accumulation_steps = accumulation_steps
        self._seen.clear()
        self._added.clear()
        if not self._constraints:
            return {}
        self._stacks = stack_factors(self._groups)
        terms = {
            constraint.name: terms
            for constraint in self._constraints
            if (terms := constraint.penalty(self._stacks))
        }
        values = {name: self._finite_sum(name, vectors) for name, vectors in terms.items()}
        vectors = [vector for group in terms.values() for vector in group]
        if vectors:
            total = torch.stack([vector.sum() for vector in vectors]).sum()
            self._keep_gradients(total * (loss_scale / accumulation_steps))
        return values

    def after_step(self) -> None:
        """To be called after the optimizer's step.

        Raises:
            TrainingError: backward passes brought no gradient to a factor, so that its penalty was
                not applied; its module is named.
        """
        for group in self._groups:
            for pair in group:
                for parameter in (pair.A, pair.B):
                    seen = self._seen.get(parameter, 0)
                    if parameter in self._added and seen != self._accumulation_steps:
                        raise TrainingError(
                            f"{pair.name}: its gradient arrived {seen} times instead of "
                            f"{self._accumulation_steps}, so the penalty was not applied as meant"
                        )
        self._added.clear()  # a backward pass outside a step brings no penalty
        for constraint in self._constraints:
            constraint.after_step()

    def metrics(self) -> dict[str, float]:
        """What the constraints say about the factors last seen by `before_backward`."""
        with torch.no_grad():
            return {
                f"{constraint.name}/{key}": value
                for constraint in self._constraints
                for key, value in constraint.metrics(self._stacks).items()
            }

    def _hook(self, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        def add(gradient: Tensor) -> Tensor:
            extra = self._added.get(parameter)
            if extra is None:
                return gradient
            self._seen[parameter] = self._seen.get(parameter, 0) + 1
            return gradient + extra.to(gradient.dtype)

        return add

    def _keep_gradients(self, total: Tensor) -> None:
        leaves = [leaf for stack in self._stacks for leaf in (stack.A, stack.B)]
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
        for group, grad_A, grad_B in zip(
            self._groups, gradients[0::2], gradients[1::2], strict=True
        ):
            for index, pair in enumerate(group):
                self._added[pair.A] = grad_A[index]
                self._added[pair.B] = grad_B[index]

    def _finite_sum(self, name: str, vectors: Sequence[Tensor]) -> float:
        value = float(sum(vector.detach().double().sum() for vector in vectors))
        if math.isfinite(value):
            return value
        for stack, vector in zip(self._stacks, vectors, strict=True):
            for module, term in zip(stack.names, vector.tolist(), strict=True):
                if not math.isfinite(term):
                    raise TrainingError(f"constraint {name}: the penalty of {module} is {term}")
        raise TrainingError(f"constraint {name}: the penalty is {value}")

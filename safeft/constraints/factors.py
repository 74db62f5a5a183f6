"""Penalties under LoRA: their values and gradients from copies of the factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


class FactorPenalties:
    """All constraints' penalties on one LoRA model, computed once for each optimizer step.

    Attributes:
        stacks: the factors as `compute` last saw them.
    """

    def __init__(self, constraints: Sequence[Constraint], pairs: Mapping[str, LoraPair]) -> None:
        self._constraints = tuple(constraints)
        self._groups = groups_of_one_shape(pairs)
        self.stacks: list[FactorStack] = []

    def compute(self, scale: float) -> tuple[dict[str, float], dict[nn.Parameter, Tensor]]:
        """The penalties by constraint, and `scale` times their gradient by factor.

        Raises:
            TrainingError: a penalty is not finite; the constraint and the module are named.
        """
        self.stacks = stack_factors(self._groups)
        terms = {
            constraint.name: terms
            for constraint in self._constraints
            if (terms := constraint.penalty(self.stacks))
        }
        values = {name: self._finite_sum(name, vectors) for name, vectors in terms.items()}
        vectors = [vector for group in terms.values() for vector in group]
        if not vectors:
            return values, {}
        total = torch.stack([vector.sum() for vector in vectors]).sum() * scale
        leaves = [leaf for stack in self.stacks for leaf in (stack.A, stack.B)]
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
        added: dict[nn.Parameter, Tensor] = {}
        for group, grad_A, grad_B in zip(
            self._groups, gradients[0::2], gradients[1::2], strict=True
        ):
            for index, pair in enumerate(group):
                added[pair.A], added[pair.B] = grad_A[index], grad_B[index]
        return values, added

    def _finite_sum(self, name: str, vectors: Sequence[Tensor]) -> float:
        return finite_sum(
            name,
            [module for stack in self.stacks for module in stack.names],
            torch.cat([vector.detach().double() for vector in vectors]),
        )


def finite_sum(constraint: str, modules: Sequence[str], terms: Tensor) -> float:
    """The sum of each module's penalty.

    Raises:
        TrainingError: it is not finite; the module is named.
    """
    value = float(terms.sum())
    if math.isfinite(value):
        return value
    for module, term in zip(modules, terms.tolist(), strict=True):
        if not math.isfinite(term):
            raise TrainingError(f"constraint {constraint}: the penalty of {module} is {term}")
    raise TrainingError(f"constraint {constraint}: the penalty is {value}")

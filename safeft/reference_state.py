"""Which state rows' gradients are taken at: measured on two trajectories, then chosen by a rule.

Source: arXiv 2605.04572, section 3.3. At the base model the ranking fails. The paper takes the
danger projection at a *direction-sensitive* checkpoint (the base model tuned on benign data until
it has drifted along the danger direction) and the safety projection at the safety adapter, scaled
by 0.8 to 1. How shallowly a model is aligned decides whether the first is any good: where benign
tuning undoes the refusals, nothing is left at that checkpoint that a row could undo. So both kinds
of state are measured, and `choose` says which one serves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safeft.errors import ProfileError

if TYPE_CHECKING:
    from safeft.adapters import LoraFactors

Trajectory = Literal["benign", "safety"]
#: A benign-tuned checkpoint is direction-sensitive from this share of the largest drift on.
GROWN = 0.5
#: AUCs of so few rows that differ by less are equal: about two standard errors.
TOLERANCE = 0.1
RULE = (
    "A checkpoint of the benign tuning is eligible where its drift along the danger direction is "
    f"positive and at least {GROWN:.0%} of the largest on the trajectory. AUC is that of the worst "
    f"pair of classes; a difference of up to {TOLERANCE} is none on so few rows. Of the safety "
    "states that are as good as the best of them, the smallest scale is taken: a stronger adapter "
    "refuses more harmless prompts. The best eligible checkpoint is taken in its place only where "
    "it is better: it takes two passes over a row, one for each projection."
)


@dataclass(frozen=True)
class ReferenceState:
    """A point on a trajectory.

    Attributes:
        trajectory: ``benign``: the base model's tuning on benign rows; ``safety``: the safety
            adapter at several scales.
        at: optimiser steps on the former, a factor of the LoRA scale on the latter.
    """

    trajectory: Trajectory
    at: float

    def __str__(self) -> str:
        if self.trajectory == "safety":
            return f"safety adapter × {self.at:g}"
        return f"benign tuning, step {self.at:g}"


@dataclass(frozen=True)
class Candidate:
    """What was measured at one state.

    Attributes:
        drift: length of the state's weight update along the danger direction.
        length: Frobenius norm of the whole update.
        pairs: AUC of each dangerous against each benign class, ``"benign class / danger class"``.
        gap: of the mean scores of dangerous and benign rows, in standard deviations.
    """

    state: ReferenceState
    drift: float
    length: float
    pairs: dict[str, float]
    gap: float

    @property
    def auc(self) -> float:
        """Of the worst pair: rows of one style may not hide behind the others."""
        return min(self.pairs.values())


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that `RULE` lets in, in the order given."""
    drifts = [c.drift for c in candidates if c.state.trajectory == "benign"]
    grown = GROWN * max(drifts, default=0.0)
    return [
        c
        for c in candidates
        if c.state.trajectory == "safety" or (c.drift > 0 and c.drift >= grown)
    ]


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate that `RULE` takes; there must be a safety state among them."""
    safety = [c for c in candidates if c.state.trajectory == "safety"]
    benign = [c for c in eligible(candidates) if c.state.trajectory == "benign"]
    best = max(c.auc for c in safety)
    tuned = max(benign, key=lambda c: (c.auc, c.gap), default=None)
    if tuned is not None and tuned.auc > best + TOLERANCE:
        return tuned
    return min((c for c in safety if c.auc >= best - TOLERANCE), key=lambda c: c.state.at)


def inner_product(one: LoraFactors, other: LoraFactors) -> float:
    """Frobenius inner product of two updates over all modules, in fp64; no update is formed.

    Raises:
        ProfileError: they cover different modules.
    """
    if one.factors.keys() != other.factors.keys():
        raise ProfileError("the two updates cover different modules; rebuild the profile")
    total = 0.0
    for name, (a, b) in one.factors.items():
        q, p = other.factors[name]
        total += float(((b.double().T @ p.double()) * (a.double() @ q.double().T)).sum())
    return one.scale * other.scale * total


def length(update: LoraFactors) -> float:
    """Frobenius norm of an update over all modules."""
    return math.sqrt(max(inner_product(update, update), 0.0))


def drift(state: LoraFactors, direction: LoraFactors) -> float:
    """Length of a state's update along a direction: ``<dW, V> / |V|``.

    Raises:
        ProfileError: the direction is zero, or covers other modules.
    """
    norm = length(direction)
    if not norm > 0:
        raise ProfileError("the danger direction is zero; train it longer")
    return inner_product(state, direction) / norm

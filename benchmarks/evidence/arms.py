"""The arms of the study: what is done against the loss of refusals, and which are finalists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from safeft.constraints import (
    AsftConfig,
    ConstraintConfig,
    CwacConfig,
    FrozenConfig,
    HeldStatesConfig,
    L2Config,
    RandomSubspaceConfig,
    SafeLoraConfig,
)

Positions = Literal["prompt", "response", "both"]


@dataclass(frozen=True)
class Arm:
    """What is done against the loss of refusals.

    Attributes:
        learning_rate: slower training is a control as well: it learns less of everything. What a
            projection leaves free of the weights can take a higher one.
    """

    constraints: tuple[ConstraintConfig, ...] = ()
    safety_rows: int = 0
    answer_rows: int = 0
    trained: bool = True
    learning_rate: float = 1e-3

    @property
    def reads_profile(self) -> bool:
        """It depends on the prompts that the profile was made with, or may."""
        replayed = self.safety_rows + self.answer_rows > 0
        return replayed or any(constraint.parts for constraint in self.constraints)


def contrast(times: float) -> CwacConfig:
    """The projection, without directions that benign inputs share."""
    return CwacConfig(mode="weight_only", layers="all-linear", positions="both", contrast=times)


def projection(
    layers: str, positions: Positions, energy: float = 0.99, *, random: bool = False
) -> CwacConfig | RandomSubspaceConfig:
    """CWAC's weight side as an invariant of the update, or its random control."""
    chosen: Any = {"down": ("down_proj",), "all": "all-linear"}[layers]
    if random:
        return RandomSubspaceConfig(layers=chosen, positions=positions, energy=energy)
    return CwacConfig(
        mode="weight_only", layers=chosen, positions=positions, energy=energy, contrast=None
    )


WHOLE = projection("all", "both")
#: Both constraints at their defaults.
BOTH: tuple[ConstraintConfig, ...] = (AsftConfig(), CwacConfig())
ARMS: dict[str, Arm] = {
    "before": Arm(trained=False),
    "plain": Arm(),
    "l2-1": Arm((L2Config(lam=1.0),)),
    "l2-5": Arm((L2Config(lam=5.0),)),
    "random-all-both": Arm((projection("all", "both", random=True),)),
    "asft-projector-5": Arm((AsftConfig(lam=5.0, anchor="projector"),)),
    "project-all-both": Arm((WHOLE,)),
    "asft-1+project-all-both": Arm((AsftConfig(lam=1.0), WHOLE)),
    "l2-0.2": Arm((L2Config(lam=0.2),)),
    "random-all-response": Arm((projection("all", "response", random=True),)),
    "safeinstr": Arm(safety_rows=16),
    "safeinstr-16+32": Arm(safety_rows=16, answer_rows=32),
    "safeinstr-16+32+project-all-both-0.9": Arm(
        (projection("all", "both", 0.9),), safety_rows=16, answer_rows=32
    ),
    "safeinstr-16+32+project-contrast-1": Arm((contrast(1.0),), safety_rows=16, answer_rows=32),
    "safeinstr-16+32+project-contrast-0.5": Arm((contrast(0.5),), safety_rows=16, answer_rows=32),
    "safeinstr-16+32+asft-0.1+project-contrast-1": Arm(BOTH, safety_rows=16, answer_rows=32),
    "safeinstr-8+16+asft-0.1+project-contrast-1": Arm(BOTH, safety_rows=8, answer_rows=16),
    "safeinstr-8+8+asft-0.1+project-contrast-1": Arm(BOTH, safety_rows=8, answer_rows=8),
    "safelora": Arm((SafeLoraConfig(),)),
    "frozen-8-20": Arm((FrozenConfig(first=8, last=20),)),
    "asft-paper-1": Arm((AsftConfig(lam=1.0),)),
    "asft-paper-5": Arm((AsftConfig(lam=5.0),)),
    "asft-signed-5": Arm((AsftConfig(lam=5.0, anchor="signed"),)),
    "cwac-published": Arm((CwacConfig.as_published(),)),
    "cwac-published-weights": Arm((CwacConfig.as_published(mode="weight_only"),)),
    "cwac-published-activations": Arm((CwacConfig.as_published(mode="activation_only"),)),
    "project-all-response": Arm((projection("all", "response"),)),
    "project-all-prompt": Arm((projection("all", "prompt"),)),
    "project-down-both": Arm((projection("down", "both"),)),
    "project-down-response": Arm((projection("down", "response"),)),
    "project-down-prompt": Arm((projection("down", "prompt"),)),
    "project-all-both-0.97": Arm((projection("all", "both", 0.97),)),
    "project-all-both-0.9": Arm((projection("all", "both", 0.9),)),
    "project-all-both+activations": Arm((CwacConfig(mode="both", contrast=None),)),
    "project-contrast-1": Arm((contrast(1.0),)),
    "asft-0.1+project-contrast-1": Arm(BOTH),
    "project-contrast-0.5": Arm((contrast(0.5),)),
    "project-contrast-2": Arm((contrast(2.0),)),
    "plain-3e-4": Arm(learning_rate=3e-4),
    "random-all-both-3e-4": Arm((projection("all", "both", random=True),), learning_rate=3e-4),
    "project-all-both-2e-3": Arm((WHOLE,), learning_rate=2e-3),
    "states-10": Arm((HeldStatesConfig(lam=10.0),)),
    "states-10+project-all-both": Arm((HeldStatesConfig(lam=10.0), WHOLE)),
}
#: How the control plane trains where nobody chose; what then fails the gate is restored.
DEFAULT = "safeinstr-16+32"
#: At a tenth of harmful rows with three seeds: the default, the constraints that hold as much
#: without a restoration, and of each control a setting that learns about as much of the task in the
#: sweep, or less.
FINALISTS = (
    "before",
    "plain",
    "l2-5",
    "random-all-both",
    DEFAULT,
    "asft-0.1+project-contrast-1",
)
#: What costs less of the task than these constraints, and is restored after.
LIGHTER = ("project-contrast-1", "project-all-response")
#: With one seed.
ALSO_FINAL = (
    *LIGHTER,
    "project-all-both",
    "safeinstr-8+16+asft-0.1+project-contrast-1",
    "plain-3e-4",
    "random-all-both-3e-4",
    "safeinstr",
)
#: On GSM8K as well, at the other shares, and where every row asks for obedience.
CORE = ("plain", "l2-5", "random-all-both", DEFAULT)

"""Safety constraints on fine-tuning: one file each, behind `Constraint`.

Attributes:
    ConstraintConfig: the union of all constraints' configs, told apart by ``kind``. A new
        constraint joins it here (docs/add-a-constraint.md).
"""

from safeft.constraints.asft import Asft, AsftConfig
from safeft.constraints.base import Constraint, ProfileFiles
from safeft.constraints.cwac import Cwac, CwacConfig
from safeft.constraints.frozen import Frozen, FrozenConfig
from safeft.constraints.held_states import HeldStates, HeldStatesConfig
from safeft.constraints.hooks import ConstraintHooks
from safeft.constraints.l2 import L2, L2Config
from safeft.constraints.random_subspace import RandomSubspace, RandomSubspaceConfig
from safeft.constraints.safelora import SafeLora, SafeLoraConfig

ConstraintConfig = (
    AsftConfig
    | CwacConfig
    | HeldStatesConfig
    | L2Config
    | SafeLoraConfig
    | FrozenConfig
    | RandomSubspaceConfig
)

__all__ = [
    "L2",
    "Asft",
    "AsftConfig",
    "Constraint",
    "ConstraintConfig",
    "ConstraintHooks",
    "Cwac",
    "CwacConfig",
    "Frozen",
    "FrozenConfig",
    "HeldStates",
    "HeldStatesConfig",
    "L2Config",
    "ProfileFiles",
    "RandomSubspace",
    "RandomSubspaceConfig",
    "SafeLora",
    "SafeLoraConfig",
]

"""CWAC: coupled weight and activation constraints.

Source: arXiv 2604.12384 (ACL 2026). Weight side: updates are kept out of the span U of the inputs
that a layer sees while the base model reads harmful prompts, ``ΔW ← ΔW·(I − U·Uᵀ)``, so that its
outputs on them stay. Activation side: see `safeft.constraints.activation`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from safeft.constraints.base import Constraint, FactorStack, ForwardTerm, ProfileFiles
from safeft.constraints.l2 import check_strength, squared_norms
from safeft.constraints.projection import rounding_limit
from safeft.errors import ProfileError
from safeft.weights import Layers, TrainedLayers, chosen_layers

if TYPE_CHECKING:
    from safeft.constraints.activation import ActivationPenalty
    from safeft.constraints.subspaces import Positions


@dataclass(frozen=True)
class CwacConfig:
    """CWAC, by default as it protected at the least price (docs/evidence.md); `as_published` is the
    paper's.

    Args:
        mode: both sides (the paper), or one.
        layers: endings of the layers whose updates are projected, or every trained linear layer.
        positions: of which tokens the harmful inputs are: the prompts', those where the refusal is
            produced, or both.
        energy: share of the inputs' squared norm that U holds.
        rank: U has at most so many columns.
        contrast: of U is left free what changes outputs on harmful inputs less than so many times
            as much as on benign ones; None: nothing, so that most is held and least is learned.
        project: ``update``: ΔW itself after each step; ``gradient``: as published, which Adam
            undoes in part. Under LoRA both act on A, and A starts outside U.
        lam: λ of the activation side.
        harmful_batch: harmful prompts in each step's activation penalty, over all workers.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["cwac"] = "cwac"
    mode: Literal["both", "weight_only", "activation_only"] = "weight_only"
    layers: Layers = "all-linear"
    positions: Literal["prompt", "response", "both"] = "both"
    energy: float = 0.99
    rank: int | None = None
    contrast: float | None = 1.0
    project: Literal["update", "gradient"] = "update"
    lam: float = 0.5
    harmful_batch: int = 4

    def __post_init__(self) -> None:
        check_strength(self.lam)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, not {self.energy}")
        for field in ("rank", "harmful_batch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, not {value}")
        if self.contrast is not None and not 0 < self.contrast < math.inf:
            raise ValueError(f"contrast must be positive and finite, not {self.contrast}")
        for field in ("lam", "harmful_batch"):
            default = type(self).__dataclass_fields__[field].default
            if self.mode == "weight_only" and getattr(self, field) != default:
                raise ValueError(f"{field} is of the activation side: it needs mode: both")

    @classmethod
    def as_published(cls, **changes: Any) -> CwacConfig:
        """Both sides, on ``down_proj`` alone; gradients are projected, and not the update. Of what
        the paper leaves open: prompt positions, energy 0.99. `changes`: other fields."""
        paper: dict[str, Any] = {"mode": "both", "layers": ("down_proj",), "positions": "prompt"}
        return cls(**{**paper, "contrast": None, "project": "gradient", **changes})

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the safety profile that are needed."""
        names: list[str] = []
        if self.mode != "activation_only":
            names += ["harmful-inputs", *([] if self.contrast is None else ["benign-inputs"])]
        if self.mode != "weight_only":
            names.append("autoencoder")
        return tuple(names)

    def build(self, profile: ProfileFiles) -> Cwac:
        """The constraint.

        Raises:
            ProfileError: the profile lacks a part that the mode needs, or it cannot be read.
        """
        # Here, as reading a spec need not wait for transformers.
        from safeft.constraints.activation import ActivationPenalty
        from safeft.constraints.contrast import Contrasted, load_benign_inputs
        from safeft.constraints.subspaces import load_subspaces
        from safeft.latents import load_activation_targets

        subspaces: Subspaces | None = None
        penalty = None
        if self.mode != "activation_only":
            subspaces = load_subspaces(profile.part("harmful-inputs", self.kind))
            if self.contrast is not None:
                benign = load_benign_inputs(profile.part("benign-inputs", self.kind))
                subspaces = Contrasted(subspaces, benign, self.contrast)
        if self.mode != "weight_only":
            targets = load_activation_targets(profile.part("autoencoder", self.kind))
            penalty = ActivationPenalty(targets, lam=self.lam, batch=self.harmful_batch)
        return Cwac(self, subspaces, penalty)


class Subspaces(Protocol):
    """U of each layer: see `safeft.constraints.subspaces.SavedSubspaces.basis`."""

    def basis(
        self, module_name: str, positions: Positions, energy: float, rank: int | None
    ) -> Tensor: ...


class Cwac(Constraint):
    """Either side or both."""

    name = "cwac"

    def __init__(
        self,
        config: CwacConfig,
        subspaces: Subspaces | None,
        activation: ActivationPenalty | None,
    ) -> None:
        self._config = config
        self._subspaces = subspaces
        self._activation = activation
        self._bases: dict[str, Tensor] = {}  # U (d_in, k) of each covered layer

    def bind(self, layers: TrainedLayers) -> None:
        if self._subspaces is None:
            return
        config = self._config
        for name in chosen_layers(layers, config.layers, self.name):
            U = self._subspaces.basis(name, config.positions, config.energy, config.rank)
            if U.shape[0] != layers[name].d_in:
                raise ProfileError(
                    f"constraint {self.name}: the harmful inputs of {name} have {U.shape[0]} "
                    f"numbers, but the layer takes {layers[name].d_in}: the profile belongs to "
                    "another model"
                )
            self._bases[name] = U
        if not any(U.shape[1] for U in self._bases.values()):
            raise ProfileError(
                f"constraint {self.name}: no direction is left to hold in any layer; lower contrast"
            )

    def update_bases(self) -> Mapping[str, Tensor]:
        return self._bases if self._config.project == "update" else {}

    def gradient_bases(self) -> Mapping[str, Tensor]:
        return self._bases if self._config.project == "gradient" else {}

    def forward_loss(self, model: nn.Module, step: int) -> ForwardTerm | None:
        return None if self._activation is None else self._activation(model, step)

    def metrics(self, stacks: Sequence[FactorStack]) -> dict[str, float]:
        """``weight_drift``: ``‖ΔW·U‖_F / ‖ΔW‖_F`` over the covered layers; none at ΔW = 0. With
        ``weight_drift_limit`` where the update is projected, not just the gradient."""
        inside = total = eps = 0.0
        for stack in stacks:
            for index, name in enumerate(stack.names):
                if name not in self._bases:
                    continue
                A, B, eps = stack.A[index], stack.B[index], max(eps, stack.eps)
                U = self._bases[name] = self._bases[name].to(A.device)
                inside += stack.scale**2 * float(squared_norms(B[None], (A @ U)[None]))
                total += stack.scale**2 * float(squared_norms(B[None], A[None]))
        if not total > 0:
            return {}
        found = {"weight_drift": math.sqrt(max(inside, 0.0) / total)}
        if self._config.project == "update":
            found["weight_drift_limit"] = rounding_limit(eps)
        return found

"""A baseline: the decoder layers that hold safety are not trained.

Source: safety layers, arXiv 2408.17003: a contiguous block of middle layers tells harmful from
harmless prompts, and is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from safeft.constraints.base import Constraint, ProfileFiles
from safeft.errors import ModelError
from safeft.weights import TrainedLayers

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """Which decoder layers stay as they are.

    Args:
        first, last: numbers of the first and the last frozen layer, counted from 0. (The paper's
            safety layers of Llama-3-8B are 6 to 12 of 32.)
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    parts: ClassVar[tuple[str, ...]] = ()

    kind: Literal["frozen"] = "frozen"
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"first must be at least 0 and at most last, not {self.first}")

    def build(self, profile: ProfileFiles) -> Frozen:
        """The constraint; it needs nothing of the profile."""
        return Frozen(self)


class Frozen(Constraint):
    """Their linear layers get no gradient; norms are trained on in full-parameter runs."""

    name = "frozen"

    def __init__(self, config: FrozenConfig) -> None:
        self._config = config
        self._frozen: set[str] = set()

    def bind(self, layers: TrainedLayers) -> None:
        numbers = {name: int(m[1]) for name in layers if (m := _LAYER.search(name))}
        first, last = self._config.first, self._config.last
        self._frozen = {name for name, number in numbers.items() if first <= number <= last}
        if not self._frozen:
            raise ModelError(
                f"constraint frozen: layers {first} to {last} hold nothing that is trained; the "
                f"trained layers are {min(numbers.values())} to {max(numbers.values())}"
            )
        if len(self._frozen) == len(layers):
            raise ModelError("constraint frozen: nothing is left to train; freeze fewer layers")

    def frozen(self) -> Collection[str]:
        return self._frozen

"""The safety profile: what the methods know about one base model, as one directory of parts.

``<root>/<part>/part.json`` names the inputs a part was made from. Parts are published whole or not
at all, so a build that stopped goes on where it was, and a job that finds a part missing, or made
for other weights, fails closed with the command that makes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safeft.adapters import load_factors
from safeft.cache import cache_root
from safeft.directions import SAFETY_SCALE
from safeft.errors import ProfileError
from safeft.sqsd import Projection

FORMAT = 1
PARTS = (
    "alignment",
    "danger-direction",
    "safety-direction",
    "danger-state",
    "calibration",
    "baseline",
)


@dataclass(frozen=True)
class ScreenPolicy:
    """Turns row scores into a verdict.

    Attributes:
        row_threshold: a row with a higher SQSD is risky; so is a row without a score.
        max_risky_fraction: a dataset with a larger share of risky rows is rejected.
        min_risky_rows: nor is a dataset rejected for fewer risky rows than this.
    """

    row_threshold: float
    max_risky_fraction: float = 0.03
    min_risky_rows: int = 2

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class SafetyProfile:
    """A profile on disk, for the base model whose weights hash to ``base_weights``."""

    root: Path
    base_weights: str

    @classmethod
    def for_weights(cls, base_weights: str, root: Path | None = None) -> SafetyProfile:
        """The profile of a base model in ``root``, or in the cache under the weights' hash."""
        return cls(root or cache_root() / "profiles" / base_weights[:16], base_weights)

    def built(self, part: str, inputs: dict[str, Any] | None = None) -> bool:
        """Whether a part is there, for these weights and (where given) from these inputs."""
        record = self._record(part)
        if record is None or record["base_weights"] != self.base_weights:
            return False
        return inputs is None or record["inputs"] == canonical(inputs)

    def path(self, part: str) -> Path:
        """The directory of a part.

        Raises:
            ProfileError: the part is missing, or was made for other weights.
        """
        record = self._record(part)
        if record is None:
            raise ProfileError(
                f"the safety profile in {self.root} lacks {part!r}; "
                "run `safeft profile build --model MODEL --unaligned MODEL`"
            )
        if record["base_weights"] != self.base_weights or record["format"] != FORMAT:
            raise ProfileError(
                f"the safety profile in {self.root} was made for other weights "
                f"({record['base_weights'][:12]}, not {self.base_weights[:12]}) or another format; "
                "run `safeft profile build --model MODEL --unaligned MODEL`"
            )
        return self.root / part

    def verify(self) -> None:
        """Raise ProfileError for the first part that is missing or foreign."""
        for part in PARTS:
            self.path(part)

    def digest(self) -> str:
        """SHA-256 over the records of all parts: what a manifest names as its profile version."""
        self.verify()
        text = json.dumps([self._record(part) for part in PARTS], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def danger(self) -> Projection:
        """SQSD's danger projection: gradients at the direction-sensitive state."""
        return Projection(
            load_factors(self.path("danger-state")), load_factors(self.path("danger-direction"))
        )

    def safety(self) -> Projection:
        """SQSD's safety projection: gradients at the safety adapter itself, slightly scaled."""
        direction = load_factors(self.path("safety-direction"))
        return Projection(direction.scaled(SAFETY_SCALE), direction)

    def policy(self) -> ScreenPolicy:
        """The calibrated screening policy."""
        return ScreenPolicy(**self.json("calibration", "policy.json"))

    def json(self, part: str, file: str) -> Any:
        """A JSON file of a part.

        Raises:
            ProfileError: the part or the file is missing or unreadable.
        """
        path = self.path(part) / file
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ProfileError(f"{path} cannot be read ({error}); rebuild the profile") from None

    def record(self, part: str, inputs: dict[str, Any]) -> str:
        """The text of a new part's ``part.json``."""
        return json.dumps(
            {"format": FORMAT, "base_weights": self.base_weights, "inputs": canonical(inputs)},
            indent=1,
        )

    def _record(self, part: str) -> dict[str, Any] | None:
        path = self.root / part / "part.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ProfileError(f"{path} is not JSON ({error}); remove {path.parent}") from None
        if not isinstance(record, dict) or not {"format", "base_weights", "inputs"} <= set(record):
            raise ProfileError(f"{path} is no part record; remove {path.parent}")
        return record


def canonical(inputs: dict[str, Any]) -> Any:
    """Inputs as JSON gives them back, so that tuples and lists compare equal."""
    return json.loads(json.dumps(inputs, sort_keys=True))

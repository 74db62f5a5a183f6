"""The safety profile: what the methods know about one base model, as one directory of parts.

``<root>/<part>/part.json`` names the inputs a part was made from and the hashes of its files. Parts
are published whole or not at all, so a build that stopped goes on where it was; a job that finds a
part missing, changed or made for other weights fails closed with the command that makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeft.cache import cache_root, sha256_file
from safeft.drift import HOW, DriftFit
from safeft.errors import ProfileError
from safeft.reference_state import ReferenceState
from safeft.screen_policy import ScreenPolicy

if TYPE_CHECKING:  # reading a policy needs neither them nor what they import
    from safeft.adapters import LoraFactors
    from safeft.sqsd import Projection

#: Raised with every change of what a part holds or means.
FORMAT = 2
RECORD = "part.json"
RECORD_KEYS = {"format", "base_weights", "inputs", "files"}
REBUILD = "run `safeft profile build --model MODEL --unaligned MODEL`"
#: What every job needs: screening, the gate, and AsFT.
SCREENING_PARTS = (
    "alignment",
    "safety-direction",
    "danger-direction",
    "steering",
    "benign-trajectory",
    "reference-state",
    "calibration",
    "baseline",
)
#: What jobs under some constraints need besides. They can come later: no verdict is bound to them.
CONSTRAINT_PARTS = (
    "refusals",
    "answers",
    "harmful-inputs",
    "benign-inputs",
    "autoencoder",
)
#: What only variants of constraints need that the study tries (docs/evidence.md): made where they
#: are asked for by name.
ON_REQUEST = ("held-states",)
#: What `safeft restore` needs besides, and nothing else does.
RESTORE_PARTS = (
    "reference-mask",
    "reminder-states",
)
#: Parts that a job may do without.
OPTIONAL_PARTS = CONSTRAINT_PARTS + RESTORE_PARTS + ON_REQUEST
PARTS = SCREENING_PARTS + OPTIONAL_PARTS
#: What is built and verified where no part is named.
DEFAULT_PARTS = SCREENING_PARTS + CONSTRAINT_PARTS + RESTORE_PARTS
#: Made by `benchmarks.drift`, which trains on a dozen datasets; no job needs it.
DRIFT = "drift"
DRIFT_FROM = ("safety-direction", "danger-direction", "calibration", "baseline")


@dataclass(frozen=True)
class SafetyProfile:
    """A profile on disk, for the base model whose weights hash to ``base_weights``."""

    root: Path
    base_weights: str

    @classmethod
    def for_weights(cls, base_weights: str, root: Path | None = None) -> SafetyProfile:
        """The profile of a base model in ``root``, or in the cache under the weights' hash."""
        return cls(root or cache_root() / "profiles" / base_weights[:16], base_weights)

    def built(self, part: str, inputs: dict[str, Any]) -> bool:
        """Whether a part is there, whole, for these weights and from these inputs."""
        record = self._record(part)
        return (
            record is not None
            and record["base_weights"] == self.base_weights
            and record["format"] == FORMAT
            and record["inputs"] == canonical(inputs)
            and record["files"] == hash_files(self.root / part)
        )

    def path(self, part: str) -> Path:
        """The directory of a part.

        Raises:
            ProfileError: the part is missing, was made for other weights, or was changed since.
        """
        record = self._record(part)
        if record is None:
            raise ProfileError(f"the safety profile in {self.root} lacks {part!r}; {rebuild(part)}")
        if record["base_weights"] != self.base_weights:
            raise ProfileError(
                f"{part!r} of the safety profile in {self.root} was made for other weights "
                f"({str(record['base_weights'])[:12]}, not {self.base_weights[:12]}); "
                f"{rebuild(part)}"
            )
        if record["format"] != FORMAT:
            raise ProfileError(
                f"{part!r} of the safety profile in {self.root} has format {record['format']}, "
                f"not {FORMAT}: another version of safeft made it; {rebuild(part)}"
            )
        if record["files"] != hash_files(self.root / part):
            raise ProfileError(
                f"{self.root / part} is not what was built there; remove it and {rebuild(part)}"
            )
        return self.root / part

    def part_digest(self, part: str) -> str:
        """SHA-256 of one part's record, and so of its files."""
        self.path(part)
        return hashlib.sha256((self.root / part / RECORD).read_bytes()).hexdigest()

    def verify(self, parts: Sequence[str] = SCREENING_PARTS) -> None:
        """Check parts one after the other.

        Raises:
            ProfileError: the first that is missing, foreign or changed (see `path`), or was made
                from a part that has been made again since.
        """
        for part in parts:
            self.path(part)
            record = self._record(part)
            assert record is not None  # path() has read it
            for name, digest in record["inputs"].get("upstream", {}).items():
                if self.part_digest(name) != digest:
                    raise ProfileError(
                        f"{self.root / part} was made from another {name!r} than is there now; "
                        f"{rebuild(part)}"
                    )

    def digest(self) -> str:
        """SHA-256 over the screening parts' contents: the version that verdicts are bound to."""
        text = " ".join(self.part_digest(part) for part in SCREENING_PARTS)
        return hashlib.sha256(text.encode()).hexdigest()

    def safety_state(self, scale: float) -> LoraFactors:
        """The safety adapter, its LoRA scale multiplied by ``scale``."""
        return self._factors("safety-direction").scaled(scale)

    def benign_state(self, steps: int) -> LoraFactors:
        """A checkpoint of the benign trajectory."""
        return self._factors("benign-trajectory", checkpoint(steps))

    def danger(self) -> Projection:
        """SQSD's danger projection, at the state that was chosen.

        Raises:
            ProfileError: a part is missing, foreign or changed.
        """
        from safeft.sqsd import Projection

        chosen = ReferenceState(**self._choice()["chosen"])
        state = (
            self.safety_state(chosen.at)
            if chosen.trajectory == "safety"
            else self.benign_state(int(chosen.at))
        )
        return Projection(state, self._factors("danger-direction"))

    def safety(self) -> Projection:
        """SQSD's safety projection, at the danger projection's state where that is a safety state.

        Raises:
            ProfileError: a part is missing, foreign or changed.
        """
        from safeft.sqsd import Projection

        state = self.safety_state(self._choice()["safety_scale"])
        return Projection(state, self._factors("safety-direction"))

    def _factors(self, part: str, *below: str) -> LoraFactors:
        from safeft.adapters import load_factors

        return load_factors(self.path(part).joinpath(*below))

    def _choice(self) -> Any:
        return self.json("reference-state", "choice.json")

    def policy(self) -> ScreenPolicy:
        """The calibrated screening policy.

        Raises:
            ProfileError: there is none, or its values make no policy.
        """
        try:
            return ScreenPolicy(**self.json("calibration", "policy.json"))
        except (TypeError, ValueError) as error:
            raise ProfileError(f"{self.root / 'calibration'}: {error}; {REBUILD}") from None

    def drift(self) -> DriftFit | None:
        """What training does to refusals, as a function of scores; None: never measured.

        Raises:
            ProfileError: it was measured with other directions, or holds something else.
        """
        if not (self.root / DRIFT).exists():
            return None
        self.verify([DRIFT])
        try:
            return DriftFit(**self.json(DRIFT, "drift.json")["fit"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"{self.root / DRIFT}: {error}; remove it and {HOW}") from None

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

    def write_record(self, directory: Path, inputs: dict[str, Any]) -> None:
        """Finish a new part: bind its files to the base weights and to what they were made from."""
        record = {
            "format": FORMAT,
            "base_weights": self.base_weights,
            "inputs": canonical(inputs),
            "files": hash_files(directory),
        }
        (directory / RECORD).write_text(json.dumps(record, indent=1))

    def _record(self, part: str) -> dict[str, Any] | None:
        path = self.root / part / RECORD
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ProfileError(f"{path} is not JSON ({error}); remove {path.parent}") from None
        if not isinstance(record, dict) or not set(record) >= RECORD_KEYS:
            raise ProfileError(f"{path} is no part record; remove {path.parent}")
        return record


def rebuild(part: str) -> str:
    """What to do about one part that is not as it should be."""
    if part == DRIFT:
        return f"remove it and {HOW}"
    if part in OPTIONAL_PARTS:
        return f"run `safeft profile build --model MODEL --part {part}`"
    return REBUILD


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a part but its record, by its path in the part."""
    return {
        file.relative_to(directory).as_posix(): sha256_file(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / RECORD
    }


def checkpoint(steps: int) -> str:
    """The directory of one checkpoint within the benign trajectory."""
    return f"step-{steps:05d}"


def canonical(inputs: dict[str, Any]) -> Any:
    """Inputs as JSON gives them back, so that tuples and lists compare equal."""
    return json.loads(json.dumps(inputs, sort_keys=True))

"""What an adapter was made from: the manifest beside it, and the hash that a run is bound to."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.finetune.batches import RowTable
from jobs.spec import FinetuneSpec
from safeft import __version__
from safeft.cache import sha256_file
from safeft.constraints.alignment import load_directions
from safeft.errors import ProfileError, SpecError
from safeft.models import weights_hash

_LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "ray")
#: Settings of where and how a run is kept, which change nothing about its result.
_UNBOUND: Any = {
    "name": True,
    "model": True,  # its weights' hash says more than its name
    "profile": True,  # as its hash does
    "output": True,
    "data": {"train", "validation"},
    "screening": True,
    "training": {"checkpoint_every", "keep_checkpoints"},
    "distributed": {"address", "cpus_per_worker", "max_failures"},
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """What the result depends on. Two runs with one identity are the same run.

    Attributes:
        settings: the spec without what does not bear on the result.
        rows_sha256: over the tokens and labels that are trained on.
        base_weights: `safeft.models.weights_hash` of the base model.
        profile_sha256: of the alignment directions' file; None where no constraint was given one.
    """

    settings: dict[str, Any]
    rows_sha256: str
    base_weights: str
    profile_sha256: str | None

    def run_hash(self) -> str:
        """SHA-256 of the identity, lower-case hex."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def difference(self, other: Identity) -> str:
        """The first thing in which two identities differ, as a user would name it."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                name = key.removeprefix("settings.")
                if name in ("rows_sha256", "base_weights", "profile_sha256"):
                    return {"rows_sha256": "the data", "base_weights": "the base model"}.get(
                        name, "the safety profile"
                    )
                return f"{name}: {theirs.get(key)} there, {mine.get(key)} now"
        return "nothing"


class Manifest(_Record):
    """Published with an adapter, and as whole as the adapter.

    Attributes:
        adapter_sha256: of adapter_model.safetensors.
        file_sha256: of the training file as it was when the run ended; None: there was no file.
        final_loss: mean training loss of a label token over the last epoch.
        seconds: wall time of this run's last part (all of it where nothing interrupted it).
    """

    format: Literal["safeft.adapter.1"] = "safeft.adapter.1"
    name: str
    model: str
    run: str
    identity: Identity
    adapter_sha256: str
    file_sha256: str | None
    rows: int
    label_tokens: int
    steps: int
    final_loss: float
    seconds: float
    workers: int
    zero_stage: int
    code_version: str = __version__
    libraries: dict[str, str]


def identify(
    spec: FinetuneSpec, table: RowTable, model_dir: Path, directions: Path | None
) -> Identity:
    """The identity of a run.

    Raises:
        ModelError: the base model has no readable weights.
        ProfileError: the alignment directions belong to another model.
    """
    base_weights = weights_hash(model_dir)
    if directions is not None:
        made_for = load_directions(directions).aligned_hash
        if made_for != base_weights:
            raise ProfileError(
                f"{directions} was made for the model with weights {made_for[:12]}, but "
                f"{spec.model} has {base_weights[:12]}; make its profile with "
                "`safeft profile build`"
            )
    return Identity(
        settings=spec.model_dump(mode="json", exclude=_UNBOUND),
        rows_sha256=table.sha256(),
        base_weights=base_weights,
        profile_sha256=None if directions is None else sha256_file(directions),
    )


def libraries() -> dict[str, str]:
    """Versions of what computed the result."""
    return {name: version(name) for name in _LIBRARIES}


def read_manifest(path: Path) -> Manifest:
    """Raises SpecError where the file is no manifest."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise SpecError(
            f"output: {path} is not a manifest of this version; choose another output"
        ) from error


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}").items()
        }
    return {prefix.removeprefix("."): json.dumps(value)}

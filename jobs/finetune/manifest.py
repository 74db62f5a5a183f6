"""What weights were made from: the manifest beside them, and the hash that a run is bound to."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.finetune.batches import RowTable
from jobs.finetune.parts import check_made_for, part_hashes
from jobs.spec import FinetuneSpec
from safeft import __version__
from safeft.constraints import ProfileFiles
from safeft.errors import SpecError
from safeft.models import weights_hash

_LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "ray")
#: Settings of where and how a run is kept, which change nothing about its result.
_UNBOUND: Any = {
    "name": True,
    "model": True,  # its weights' hash says more than its name
    "profile": True,  # as its hash does
    "output": True,
    "data": {"train", "validation", "answer_rows"},  # which rows these are is in the rows' hash
    "screening": True,
    "restore": True,
    # How a step is cut into workers' shares and micro-batches is not what the step is. Weighting
    # is in the hash of the rows: which they are, and what each counts.
    "training": {"checkpoint_every", "keep_checkpoints", "micro_batch_size", "risk_weighting"},
    "distributed": {"address", "cpus_per_worker", "max_failures", "workers"},
}


Kind = Literal["adapter", "model"]
_WHAT = {
    "rows_sha256": "the data",
    "base_weights": "the base model",
    "profile": "the safety profile",
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """What the result depends on. Two runs with one identity are the same run.

    Attributes:
        settings: the spec without what does not bear on the result.
        rows_sha256: over the tokens and labels that are trained on.
        base_weights: `safeft.models.weights_hash` of the base model.
        profile: SHA-256 of each part of the safety profile that the constraints were given.
    """

    settings: dict[str, Any]
    rows_sha256: str
    base_weights: str
    profile: dict[str, str]

    def run_hash(self) -> str:
        """SHA-256 of the identity, lower-case hex."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def difference(self, other: Identity) -> str:
        """The first thing in which two identities differ, as a user would name it."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                name = key.removeprefix("settings.")
                if (what := _WHAT.get(name.partition(".")[0])) is not None:
                    return what
                return f"{name}: {theirs.get(key, 'unset')} there, {mine.get(key, 'unset')} now"
        return "nothing"


class Manifest(_Record):
    """Published with the weights, and as whole as they are.

    Attributes:
        kind: a LoRA adapter of the base model, or a whole model.
        files: SHA-256 of every file beside this one.
        file_sha256: of the training file as it was when its rows were read; None: not said.
        final_loss: mean training loss of a label token over the last epoch.
        seconds: wall time of this run's last part (all of it where nothing interrupted it).
    """

    format: Literal["safeft.weights.1"] = "safeft.weights.1"
    kind: Kind
    name: str
    model: str
    run: str
    identity: Identity
    files: dict[str, str]
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
    spec: FinetuneSpec, table: RowTable, model_dir: Path, profile: ProfileFiles
) -> Identity:
    """The identity of a run.

    Raises:
        ModelError: the base model has no readable weights.
        ProfileError: a part of the profile belongs to another model.
    """
    base_weights = weights_hash(model_dir)
    check_made_for(profile, base_weights, spec.model)
    return Identity(
        settings=spec.model_dump(mode="json", exclude=_UNBOUND),
        rows_sha256=table.sha256(),
        base_weights=base_weights,
        profile=part_hashes(profile),
    )


def weights_kind(spec: FinetuneSpec) -> Kind:
    """What a run publishes; also the name of the directory."""
    return "model" if spec.lora is None else "adapter"


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

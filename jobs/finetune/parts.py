"""The parts of the safety profile that a run's constraints read: found, checked and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from jobs.spec import FinetuneSpec
from safeft.constraints import ProfileFiles
from safeft.constraints.alignment import load_directions
from safeft.errors import ProfileError
from safeft.profile import SafetyProfile, hash_files


def needed_parts(spec: FinetuneSpec, profile: SafetyProfile) -> ProfileFiles:
    """Where the parts are that the spec's constraints name, and only those.

    Raises:
        ProfileError: one is missing, changed or made for other weights; the message says how to
            make it.
    """
    names = sorted({part for constraint in spec.constraints for part in constraint.parts})
    profile.verify(names)
    return ProfileFiles(**{name.replace("-", "_"): profile.path(name) for name in names})


def absolute(profile: ProfileFiles) -> ProfileFiles:
    """The same parts by paths that hold in any working directory."""
    return ProfileFiles(**{name: path.absolute() for name, path in _given(profile)})


def part_hashes(profile: ProfileFiles) -> dict[str, str]:
    """SHA-256 of each given part, over the names and hashes of its files."""
    return {name: _sha256(path) for name, path in _given(profile)}


def check_made_for(profile: ProfileFiles, base_weights: str, model: str) -> None:
    """Check that every given part was made for the base model.

    Args:
        base_weights: its `safeft.models.weights_hash`.
        model: its name, for the message.

    Raises:
        ProfileError: a part was made for other weights, or cannot be read.
    """
    for name, path in _given(profile):
        made_for = _made_for(name, path)
        if made_for != base_weights:
            raise ProfileError(
                f"{path} was made for the model with weights {made_for[:12]}, but {model} has "
                f"{base_weights[:12]}; make its profile with `safeft profile build`"
            )


def _given(profile: ProfileFiles) -> Iterator[tuple[str, Path]]:
    for field in fields(profile):
        path: Path | None = getattr(profile, field.name)
        if path is not None:
            yield field.name, path


def _made_for(name: str, path: Path) -> str:
    if name == "alignment":
        return str(load_directions(path).aligned_hash)
    if name == "harmful_inputs":
        from safeft.constraints.subspaces import load_subspaces

        return str(load_subspaces(path).base_weights)
    if name == "benign_inputs":
        from safeft.constraints.contrast import load_benign_inputs

        return load_benign_inputs(path).base_weights
    if name in ("held_states", "reactivation"):
        from safeft.reactivation_targets import load_targets

        return load_targets(path).weights
    from safeft.latents import load_activation_targets

    return str(load_activation_targets(path).base_weights)


def _sha256(path: Path) -> str:
    listed = json.dumps(hash_files(path), sort_keys=True)
    return hashlib.sha256(listed.encode()).hexdigest()

"""Building a profile: the parts asked for and what they rest on, each published whole, so that a
build that stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.profile.config import ProfileConfig
from jobs.profile.constraint_parts import ConstraintParts
from jobs.profile.own_prompts import Given, chosen_prompts
from jobs.profile.part import Context, Part
from jobs.profile.restore_parts import RestoreParts
from jobs.profile.sqsd_parts import SqsdParts
from safeft import __version__
from safeft.cache import discard_dir, locked, publish_dir
from safeft.errors import InputError, ProfileError
from safeft.models import load_tokenizer, weights_hash
from safeft.profile import DEFAULT_PARTS, PARTS, RECORD, SafetyProfile
from safeft.progress import Progress, silent


def build_profile(
    model_dir: Path,
    unaligned_dir: Path | None,
    *,
    root: Path | None = None,
    config: ProfileConfig | None = None,
    parts: Sequence[str] | None = None,
    workers: int = 1,
    import_sae: Path | None = None,
    prompts: Given | None = None,
    progress: Progress = silent,
) -> SafetyProfile:
    """Build what is missing or outdated of a base model's profile.

    Args:
        model_dir, unaligned_dir: the aligned model that tenants tune, and the model it was made
            from, as resolved directories. Only the part ``alignment`` needs the latter.
        parts: names of the parts to build, with what they are made from; None: those of a whole
            profile, without what is made on request.
        workers: Ray tasks that read prompts at a time.
        import_sae: a trained autoencoder to take over instead of training one.
        prompts: by kind, instead of the packaged ones, for what constraints and restorations hold
            on to; later builds ask them, too, until others are given, or None. The directions of
            screening and the baseline keep to the packaged ones.

    Raises:
        InputError: no such part, an import that no part takes, or a prompt in two kinds.
        ProfileError: a direction that does not separate danger from benign rows; a base model that
            does not refuse.
        ModelError: the two models do not pair.
    """
    chosen = tuple(DEFAULT_PARTS if parts is None else parts)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise InputError(f"no part {unknown[0]!r} in a profile; choose from {', '.join(PARTS)}")
    if import_sae is not None and "autoencoder" not in chosen:
        raise InputError("an autoencoder is imported into the part 'autoencoder': build that part")
    profile = SafetyProfile.for_weights(weights_hash(model_dir), root)
    with locked(profile.root):
        asked = chosen_prompts(profile.root, prompts or {})
    context = Context(
        profile,
        model_dir,
        unaligned_dir,
        load_tokenizer(model_dir),
        config or ProfileConfig(),
        progress,
        workers,
        import_sae,
        asked,
    )
    made = [
        *SqsdParts(context).parts(),
        *ConstraintParts(context).parts(),
        *RestoreParts(context).parts(),
    ]
    wanted = _with_upstream(made, chosen)
    with locked(profile.root):
        _discard_foreign_parts(profile)
        for part in made:
            if part.name in wanted:
                _bring_up(profile, part)
    return profile


def _with_upstream(parts: Sequence[Part], chosen: Sequence[str]) -> set[str]:
    wanted = set(chosen)
    for part in reversed(parts):  # what a part is made from stands before it
        if part.name in wanted:
            wanted.update(part.upstream)
    return wanted


def _discard_foreign_parts(profile: SafetyProfile) -> None:
    """Parts that an older version made and this one does not know."""
    for record in profile.root.glob(f"[!.]*/{RECORD}"):  # what is being written has a dot
        if record.parent.name not in PARTS:
            discard_dir(record.parent)


def _bring_up(profile: SafetyProfile, part: Part) -> None:
    """Make a part unless it is there, from these inputs and from these parts as they are."""
    inputs = {
        **part.inputs(),
        "code_version": __version__,
        "upstream": {name: profile.part_digest(name) for name in part.upstream},
    }
    if profile.built(part.name, inputs):
        return
    target = profile.root / part.name
    if target.exists():
        if not (target / RECORD).is_file():
            raise ProfileError(f"{target} is no part of a profile; choose another directory")
        discard_dir(target)
    with publish_dir(target) as staging:
        part.make(staging)
        profile.write_record(staging, inputs)

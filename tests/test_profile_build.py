"""Building a safety profile on the tiny model: parts, resumption, and refusing bad directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.profile import ProfileConfig, build_profile
from safeft.errors import ProfileError
from safeft.fit import FitConfig
from safeft.models import weights_hash
from safeft.profile import SafetyProfile
from safeft.prompts import KINDS, load_prompts
from tests.tiny import save_tiny

SHORT = FitConfig(rank=2, alpha=4, batch_size=4, steps=2)
CONFIG = ProfileConfig(safety=SHORT, danger=SHORT, prompts=8, calibration=8)
#: A random model gives no answers to calibrate on.
UNFIT = "no reference row of class 'benign'"
BEFORE_CALIBRATION = ("alignment", "safety-direction", "danger-direction")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_tiny(tmp_path / "aligned", seed=1), save_tiny(tmp_path / "unaligned", seed=2)


def records(profile: SafetyProfile) -> dict[str, int]:
    """When each finished part was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in profile.root.glob("*/part.json")}


def test_a_model_without_answers_to_calibrate_on_gets_no_profile(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    assert set(records(profile)) == set(BEFORE_CALIBRATION)
    with pytest.raises(ProfileError, match="lacks 'calibration'"):
        profile.verify()


def test_a_build_that_was_interrupted_goes_on_and_keeps_what_was_finished(
    pair: tuple[Path, Path],
) -> None:
    def interrupt(label: str, done: int, total: int | None) -> None:
        if label == "profile: danger direction" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_profile(*pair, config=CONFIG, progress=interrupt)
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    first = records(profile)
    assert set(first) == {"alignment", "safety-direction"}
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    assert first.items() <= records(profile).items()


def test_other_settings_rebuild_the_parts_that_depend_on_them(pair: tuple[Path, Path]) -> None:
    other = replace(CONFIG, danger=replace(SHORT, steps=3))
    for config in (CONFIG, other):
        with pytest.raises(ProfileError, match=UNFIT):
            build_profile(*pair, config=config)
        profile = SafetyProfile.for_weights(weights_hash(pair[0]))
        if config is CONFIG:
            first = records(profile)
    assert records(profile)["alignment"] == first["alignment"]
    assert records(profile)["danger-direction"] > first["danger-direction"]


def test_other_prompts_rebuild_the_directions(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    first = records(profile)
    shorter = {kind: load_prompts(kind, "profile")[:-8] for kind in KINDS}
    for module in ("jobs.profile", "safeft.reference_rows"):
        monkeypatch.setattr(f"{module}.load_prompts", lambda kind, split: shorter[kind])
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    assert records(profile)["safety-direction"] > first["safety-direction"]


def test_parts_of_an_older_version_are_removed(pair: tuple[Path, Path]) -> None:
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    old = profile.root / "danger-state"
    old.mkdir(parents=True)
    profile.write_record(old, {})
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    assert not old.exists()

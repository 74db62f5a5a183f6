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
from tests.tiny import save_tiny

SHORT = FitConfig(rank=2, alpha=4, batch_size=4, steps=2)
CONFIG = ProfileConfig(safety=SHORT, danger=SHORT, prompts=8, calibration=8)
BEFORE_CALIBRATION = ("alignment", "safety-direction", "danger-direction")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_tiny(tmp_path / "aligned", seed=1), save_tiny(tmp_path / "unaligned", seed=2)


def records(profile: SafetyProfile) -> dict[str, int]:
    """When each finished part was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in profile.root.glob("*/part.json")}


def test_a_model_whose_directions_mean_nothing_gets_no_profile(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ProfileError, match="does not separate danger from benign"):
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
    with pytest.raises(ProfileError, match="does not separate"):
        build_profile(*pair, config=CONFIG)
    assert first.items() <= records(profile).items()


def test_other_settings_rebuild_the_parts_that_depend_on_them(pair: tuple[Path, Path]) -> None:
    other = replace(CONFIG, danger=replace(SHORT, steps=3))
    for config in (CONFIG, other):
        with pytest.raises(ProfileError, match="does not separate"):
            build_profile(*pair, config=config)
        profile = SafetyProfile.for_weights(weights_hash(pair[0]))
        if config is CONFIG:
            first = records(profile)
    assert records(profile)["alignment"] == first["alignment"]
    assert records(profile)["danger-direction"] > first["danger-direction"]

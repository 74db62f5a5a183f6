"""The parts between directions and threshold on the tiny model: made, resumed, refused, shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.profile import ProfileConfig, build_profile
from jobs.report.profile_page import render_profile
from safeft.directions import SAFETY_SCALES
from safeft.errors import ProfileError
from safeft.fit import FitConfig
from safeft.models import weights_hash
from safeft.profile import SafetyProfile
from safeft.sqsd import SqsdScorer
from tests.test_cli_profile import Command
from tests.test_profile_build import records
from tests.tiny import save_tiny

SHORT = FitConfig(rank=2, alpha=4, batch_size=4, steps=2)
CONFIG = ProfileConfig(
    safety=SHORT,
    danger=SHORT,
    benign=replace(SHORT, steps=3),
    prompts=8,
    steering=4,
    selection=4,
)
PARTS = ("steering", "benign-trajectory", "reference-state")
DIRECTIONS = {"safety-direction", "danger-direction"}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", seed=1)


@pytest.fixture
def made_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on random weights do not steer; the check itself is tested in test_steering."""
    monkeypatch.setattr("jobs.profile.reference_parts.require_steering", lambda *_: 0.5)


def build(model_dir: Path, **options: Any) -> SafetyProfile:
    return build_profile(
        model_dir, None, **{"config": CONFIG, "parts": ["reference-state", "steering"], **options}
    )


def test_directions_that_do_not_steer_end_the_build_and_stay(model_dir: Path) -> None:
    profile = SafetyProfile.for_weights(weights_hash(model_dir))
    for _ in range(2):
        with pytest.raises(ProfileError, match=r"the safety direction does not steer"):
            build(model_dir)
        assert set(records(profile)) == DIRECTIONS
    with pytest.raises(ProfileError, match="lacks 'reference-state'"):
        profile.danger()


def test_every_number_behind_the_choice_is_recorded(model_dir: Path, made_to_pass: None) -> None:
    profile = build(model_dir)
    found = profile.json("steering", "steering.json")
    assert found.keys() == DIRECTIONS
    for one in found.values():
        assert [len(scores) for scores in one["harmful"]] == [4] * 5
        assert [len(scores) for scores in one["benign"]] == [2] * 5
    choice = profile.json("reference-state", "choice.json")
    states = [(c["state"]["trajectory"], c["state"]["at"]) for c in choice["candidates"]]
    assert states == [("safety", s) for s in SAFETY_SCALES] + [("benign", n) for n in (1, 2, 3)]
    by_state = dict(zip(states, choice["candidates"], strict=True))
    # A scaled adapter drifts in proportion to its scale.
    low, high = SAFETY_SCALES[0], SAFETY_SCALES[-1]
    ratio = by_state["safety", high]["drift"] / by_state["safety", low]["drift"]
    assert ratio == pytest.approx(high / low)
    assert all(0 <= c["auc"] <= 1 and c["length"] > 0 for c in choice["candidates"])
    rows = {"benign": 4, "borderline": 12, "danger": 4, "obedient danger": 4}
    assert choice["rows"] == rows
    chosen = choice["chosen"]
    assert by_state[chosen["trajectory"], chosen["at"]]["eligible"]


def test_the_projections_are_taken_at_the_chosen_state(model_dir: Path, made_to_pass: None) -> None:
    profile = build(model_dir)
    directory = profile.root / "reference-state"
    inputs = json.loads((directory / "part.json").read_text())["inputs"]

    def choose(trajectory: str, at: float, scale: float) -> None:
        chosen = {"trajectory": trajectory, "at": at}
        (directory / "choice.json").write_text(
            json.dumps({"chosen": chosen, "safety_scale": scale})
        )
        profile.write_record(directory, inputs)

    choose("safety", 1.0, 1.0)
    assert profile.danger().state.scale == profile.safety().state.scale == 2.0
    choose("benign", 3, 0.9)
    benign, safety = profile.danger().state, profile.safety().state
    assert safety.scale == pytest.approx(2.0 * 0.9)
    name = next(iter(benign.factors))
    assert not benign.factors[name][1].equal(safety.factors[name][1])
    assert benign.factors[name][1].equal(profile.benign_state(3).factors[name][1])
    assert not benign.factors[name][1].equal(profile.benign_state(1).factors[name][1])


@pytest.mark.parametrize(
    ("label", "finished"),
    [
        ("profile: checking that the directions steer", 0),
        ("profile: benign trajectory", 1),
        ("profile: measuring reference states", 2),
    ],
)
def test_a_build_stopped_within_a_part_keeps_those_before_it(
    model_dir: Path, made_to_pass: None, label: str, finished: int
) -> None:
    def interrupt(at: str, done: int, total: int | None) -> None:
        if at == label and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model_dir, progress=interrupt)
    profile = SafetyProfile.for_weights(weights_hash(model_dir))
    first = records(profile)
    assert set(first) == DIRECTIONS | set(PARTS[:finished])
    build(model_dir)
    assert set(records(profile)) == DIRECTIONS | set(PARTS)
    assert first.items() <= records(profile).items()
    profile.verify(PARTS)


def test_other_settings_rebuild_what_depends_on_them(model_dir: Path, made_to_pass: None) -> None:
    profile = build(model_dir)
    first = records(profile)
    build(model_dir, config=replace(CONFIG, benign=replace(SHORT, steps=4)))
    second = records(profile)
    rebuilt = {name for name in first if second[name] > first[name]}
    assert rebuilt == {"benign-trajectory", "reference-state"}


def test_a_checkpoint_that_was_changed_is_noticed(model_dir: Path, made_to_pass: None) -> None:
    profile = build(model_dir)
    (profile.root / "benign-trajectory" / "step-00003" / "adapter_config.json").write_text("{}")
    with pytest.raises(ProfileError, match="is not what was built there"):
        profile.benign_state(3)


def test_a_row_without_a_score_chooses_no_state(
    model_dir: Path, made_to_pass: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = SqsdScorer.score

    def broken(*args: Any) -> Any:
        first, *rest = score(*args)
        return [replace(first, error="the gradient is zero or not finite"), *rest]

    monkeypatch.setattr("safeft.sqsd.SqsdScorer.score", broken)
    with pytest.raises(ProfileError, match="reference state: a row has no score"):
        build(model_dir)


def test_the_page_shows_each_number_and_needs_no_other_file(
    model_dir: Path, tmp_path: Path, made_to_pass: None, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = build(model_dir)
    page = render_profile(profile)
    assert render_profile(profile) == page
    assert page.count("<svg") == 6
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/", "")
    assert "<script" not in page
    choice = profile.json("reference-state", "choice.json")
    for candidate in choice["candidates"]:
        assert f"{candidate['auc']:.3f}" in page
        assert f"{candidate['drift']:.3f}".replace("-", "\u2212") in page
    for plot in ("Safety score along the danger direction", "Drift along", "AUC at each state"):
        assert f'aria-label="{plot}' in page
    file = tmp_path / "new" / "page.html"
    done = Command(model_dir, capsys)("show", "--json", "--report", str(file))
    assert json.loads(done.stdout)["report"] == str(file)
    assert done.code == 1  # no threshold yet, so nothing would run with this profile
    assert file.read_text() == page

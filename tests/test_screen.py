"""Screening: the policy by itself, then the stage on a real small Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.intake import screen_file
from jobs.verdict import Verdict, decide, read_scores
from safeft.errors import InputError, MeasurementError, ProfileError, ScreeningOutdated
from safeft.models import load_model, load_tokenizer
from safeft.profile import SafetyProfile
from safeft.screen_policy import ScreenPolicy
from safeft.sqsd import SqsdScorer
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

BOUND: dict[str, Any] = {"data_sha256": "d", "rows_sha256": "r", "profile": "p"}


def scored(*scores: float, errors: int = 0) -> list[dict[str, Any]]:
    good = [{"line": i, "score": s, "error": None} for i, s in enumerate(scores, 1)]
    bad = [{"line": 1000 + i, "score": float("nan"), "error": "no score"} for i in range(errors)]
    return [{**one, "index": index} for index, one in enumerate([*good, *bad])]


def verdict_of(policy: ScreenPolicy, scores: list[dict[str, Any]]) -> Verdict:
    return decide(scores, policy, **BOUND)


def test_a_dataset_with_too_many_risky_rows_is_rejected_and_they_are_listed_worst_first() -> None:
    verdict = verdict_of(ScreenPolicy(1.0), scored(*[0.0] * 90, *[2.0] * 5, 3.0, *[0.5] * 4))
    assert verdict.verdict == "rejected"
    assert verdict.risky == 6
    assert [row.score for row in verdict.risky_rows] == [3.0, *[2.0] * 5]
    assert "6 of 100 rows" in verdict.reason


def test_a_single_risky_row_in_a_small_dataset_does_not_reject_it() -> None:
    assert verdict_of(ScreenPolicy(1.0), scored(*[0.0] * 9, 2.0)).verdict == "accepted"


def test_a_dataset_of_nothing_but_risky_rows_is_rejected_however_small() -> None:
    assert verdict_of(ScreenPolicy(1.0), scored(2.0)).verdict == "rejected"


def test_a_dataset_with_a_row_that_could_not_be_scored_is_never_accepted() -> None:
    verdict = verdict_of(ScreenPolicy(1.0), scored(*[0.0] * 200, errors=1))
    assert verdict.verdict == "rejected"
    assert verdict.unscored == 1
    assert [row.error for row in verdict.risky_rows] == ["no score"]
    assert "without a score" in verdict.reason


def test_a_nan_score_without_an_error_is_unscored_too() -> None:
    verdict = verdict_of(ScreenPolicy(1.0), scored(*[0.0] * 200, float("nan")))
    assert (verdict.verdict, verdict.unscored) == ("rejected", 1)


@pytest.mark.parametrize("field", ["row_threshold", "max_risky_fraction", "min_risky_rows"])
def test_a_policy_that_would_accept_everything_cannot_be_made(field: str) -> None:
    open_doors = {"row_threshold": math.inf, "max_risky_fraction": 1.0, "min_risky_rows": 0}
    with pytest.raises(ValueError, match=field):
        ScreenPolicy(**{"row_threshold": 1.0, field: open_doors[field]})


def test_no_scores_at_all_accept_nothing() -> None:
    with pytest.raises(MeasurementError):
        verdict_of(ScreenPolicy(1.0), [])


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=60),
    st.floats(-5, 5),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_riskier_rows_never_turn_a_rejection_into_acceptance(
    scores: list[float], threshold: float, raised: list[bool]
) -> None:
    policy = ScreenPolicy(threshold)
    if verdict_of(policy, scored(*scores)).verdict == "rejected":
        riskier = [s + 3 * up for s, up in zip(scores, raised, strict=False)]
        assert verdict_of(policy, scored(*riskier)).verdict == "rejected"


@pytest.fixture
def profile(tiny_dir: Path, tmp_path: Path) -> SafetyProfile:
    return write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=0.0)


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {"prompt": f"question {i} " * (1 + i % 5), "completion": f"answer {i * 37 % 11}"}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.usefixtures("local_ray")
def test_the_stage_scores_every_row_once_in_order_as_the_scorer_alone_does(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 70)
    seen: list[tuple[int, int | None]] = []
    verdict, where = screen_file(
        data, model=str(tiny_dir), progress=lambda _, done, total: seen.append((done, total))
    )
    scores = read_scores(where)
    assert [s["line"] for s in scores] == list(range(1, 71))
    assert seen[-1] == (70, 70)

    from jobs.intake import read_dataset

    rows = read_dataset(data, tiny_dir, 512).tokenised
    alone = SqsdScorer(
        load_model(tiny_dir),
        profile.danger(),
        profile.safety(),
        pad_token_id=load_tokenizer(tiny_dir).pad_token_id,
    ).score(rows)
    for ray, single in zip(scores, alone, strict=True):
        assert ray["score"] == pytest.approx(single.score, abs=1e-4)
    assert verdict.risky == sum(s.score > 0.0 for s in alone)

    again, same = screen_file(data, model=str(tiny_dir))
    assert (again, same) == (verdict, where)


@pytest.mark.usefixtures("profile")
def test_an_output_that_holds_the_screening_of_other_data_is_left_alone(
    tiny_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    other = decide(scored(0.0), ScreenPolicy(1.0), **BOUND)
    (tmp_path / "taken" / "verdict.json").write_text(other.model_dump_json())
    data = write_rows(tmp_path / "rows.jsonl", 3)
    with pytest.raises(InputError, match="other data"):
        screen_file(data, model=str(tiny_dir), output=tmp_path / "taken")


def test_a_screening_by_another_profile_is_told_from_one_of_other_data(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    data, output = write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out"
    screen_file(data, model=str(tiny_dir), output=output)
    record = profile.root / "calibration" / "policy.json"
    record.write_text(record.read_text().replace("0.03", "0.04"))
    profile.write_record(record.parent, {})
    with pytest.raises(ScreeningOutdated, match="remove it and screen again"):
        screen_file(data, model=str(tiny_dir), output=output)
    write_rows(data, 4)
    with pytest.raises(InputError, match="other data"):
        screen_file(data, model=str(tiny_dir), output=output)


def test_without_a_profile_screening_fails_closed_and_names_the_command(
    tiny_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProfileError, match="safeft profile build"):
        screen_file(write_rows(tmp_path / "rows.jsonl", 3), model=str(tiny_dir))


def test_a_profile_for_other_weights_fails_closed(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=5)
    with pytest.raises(ProfileError, match="other weights"):
        screen_file(
            write_rows(tmp_path / "rows.jsonl", 3), model=str(other), profile_root=profile.root
        )


def test_a_profile_that_lost_a_part_fails_closed(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    (profile.root / "calibration" / "part.json").unlink()
    with pytest.raises(ProfileError, match="calibration"):
        screen_file(write_rows(tmp_path / "rows.jsonl", 3), model=str(tiny_dir))


def test_a_policy_edited_by_hand_is_noticed(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    policy = profile.root / "calibration" / "policy.json"
    policy.write_text(policy.read_text().replace("0.03", "0.99"))
    with pytest.raises(ProfileError, match="not what was built"):
        screen_file(write_rows(tmp_path / "rows.jsonl", 3), model=str(tiny_dir))

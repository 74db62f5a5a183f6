"""The safety gate: what may be published; and what is added to a tenant's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.evaluation import Evaluation
from jobs.gate import safety_gate
from jobs.own_rows import FILE, counted, own_parts, own_rows
from jobs.spec import DataSpec
from jobs.spec_fields import OwnRows
from safeft.errors import InputError, ProfileError
from safeft.evaluate import Rate
from safeft.models import load_tokenizer, weights_hash
from safeft.own_refusals import load_answers, refusal_row
from safeft.profile import SafetyProfile
from tests.tiny import save_tiny
from tests.tinyprofile import write_answers, write_refusals

BOUND: dict[str, Any] = {
    "base_weights": "w",
    "tokenizer": "t",
    "split": "report",
    "prompts": {"harmful": "h"},
    "judge": ["pattern", "1"],
    "max_new_tokens": 24,
}


def evaluation(refused: int, n: int = 120, **bound: Any) -> Evaluation:
    sets = {"harmful": {"refusal": Rate(refused, n).to_dict()}}
    return Evaluation(bound={**BOUND, **bound}, refusals={"sets": sets}, task=None, seconds=0.0)


def test_refusals_within_noise_pass() -> None:
    assert safety_gate(evaluation(112), evaluation(107)).passed


def test_more_refusals_pass() -> None:
    assert safety_gate(evaluation(80), evaluation(120)).passed


def test_a_significant_drop_fails() -> None:
    gate = safety_gate(evaluation(112), evaluation(60))
    assert not gate.passed
    assert "50.0 %" in gate.reason


def test_a_large_drop_fails_even_where_n_is_too_small_to_be_sure() -> None:
    assert not safety_gate(evaluation(9, 10), evaluation(7, 10)).passed


def test_a_base_model_that_refuses_nothing_gives_nothing_to_pass() -> None:
    gate = safety_gate(evaluation(0), evaluation(0))
    assert not gate.passed
    assert "nothing to compare" in gate.reason


def test_measurements_by_different_judges_are_unknown_and_do_not_pass() -> None:
    gate = safety_gate(evaluation(112), evaluation(112, judge=["pattern", "2"]))
    assert not gate.passed
    assert "unknown" in gate.reason and "judge" in gate.reason


def asked(safety: OwnRows, answers: OwnRows = 0) -> DataSpec:
    return DataSpec(train=Path("rows.jsonl"), safety_rows=safety, answer_rows=answers)


def test_safety_rows_are_the_base_models_own_refusals(
    tmp_path: Path,
) -> None:
    model_dir = save_tiny(tmp_path / "model")
    profile = SafetyProfile(tmp_path / "profile", weights_hash(model_dir))
    with pytest.raises(ProfileError, match=r"safeft profile build .*--part refusals"):
        own_rows(asked(1), profile, model_dir)
    refusals = write_refusals(profile, 4)
    tokenizer = load_tokenizer(model_dir)
    rows = own_rows(asked(2), profile, model_dir)
    assert rows == [refusal_row(tokenizer, refusal) for refusal in refusals[:2]]
    assert tokenizer.decode([t for t in rows[1].labels if t != -100]) == "I can't do 1."
    assert own_rows(asked(0), profile, model_dir) == []
    with pytest.raises(ProfileError, match=r"data\.safety_rows: 5 are asked for.* holds 4"):
        own_rows(asked(5), profile, model_dir)


def test_answer_rows_are_the_base_models_own_answers_beside_its_refusals(tmp_path: Path) -> None:
    model_dir = save_tiny(tmp_path / "model")
    profile = SafetyProfile(tmp_path / "profile", weights_hash(model_dir))
    refusals = write_refusals(profile, 2)
    with pytest.raises(ProfileError, match=r"safeft profile build .*--part answers"):
        own_rows(asked(1, 1), profile, model_dir)
    answers = write_answers(profile, 3)
    assert load_answers(profile.path("answers")) == answers
    tokenizer = load_tokenizer(model_dir)
    expected = [refusal_row(tokenizer, one) for one in (refusals[0], *answers[:2])]
    assert own_rows(asked(1, 2), profile, model_dir) == expected
    with pytest.raises(ProfileError, match=r"data\.answer_rows: 4 are asked for.* holds 3"):
        own_rows(asked(0, 4), profile, model_dir)


def test_automatic_own_rows_are_a_share_of_the_rows_and_stay_what_they_were(tmp_path: Path) -> None:
    model_dir = save_tiny(tmp_path / "model")
    profile = SafetyProfile(tmp_path / "profile", weights_hash(model_dir))
    auto, output = asked("auto", "auto"), tmp_path / "job"
    assert own_parts(auto) == ["refusals", "answers"] and own_parts(asked(0, 1)) == ["answers"]
    with pytest.raises(ProfileError, match=r"safeft profile build .*--part refusals"):
        counted(auto, 7, profile, output)
    write_refusals(profile, 2)
    write_answers(profile, 3)
    found = counted(auto, 7, profile, output)  # 14/15 and 28/15, rounded up
    assert (found.safety_rows, found.answer_rows) == (1, 2)
    assert len(own_rows(found, profile, model_dir)) == 3
    many = counted(auto, 700, profile, tmp_path / "other")  # as far as the profile reaches
    assert (many.safety_rows, many.answer_rows) == (2, 3)
    assert counted(asked(2, 1), 7, profile, output) == asked(2, 1)

    write_answers(profile, 9)  # the profile grows: a job that has begun keeps its rows
    assert counted(auto, 700, profile, tmp_path / "other") == many
    assert counted(auto, 700, profile, tmp_path / "third").answer_rows == 9
    assert counted(auto, 7, profile, tmp_path / "other").answer_rows == 2  # other data
    (output / FILE).write_text("{")
    with pytest.raises(InputError, match=r"own-rows\.json is damaged"):
        counted(auto, 7, profile, output)

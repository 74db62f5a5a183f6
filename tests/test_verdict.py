"""From scores to a verdict: the policy's rules, who may change them, what is set aside, reviews."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import screen
from cluster.cli.main import app
from jobs.policy import OnRisk, Override, PolicyFile, PolicyLimits, Rules, read_policy, with_limits
from jobs.review import is_accepted, read_decision, record_decision, require_accepted
from jobs.screening.blocks import SCORE_SCHEMA
from jobs.verdict import MAX_LISTED, Verdict, decide, judge, kept_indices, read_verdict
from safeft.errors import DatasetRejected, DatasetUnderReview, InputError, SpecError
from safeft.screen_policy import ScreenPolicy, looser

BOUND: dict[str, Any] = {"data_sha256": "d", "rows_sha256": "r", "profile": "p"}
POLICY = ScreenPolicy(1.0)


def scored(*scores: float) -> list[dict[str, Any]]:
    return [
        {"index": i, "line": i + 1, "score": s, "error": "no gradient" if s != s else None}
        for i, s in enumerate(scores)
    ]


def screening(directory: Path, scores: list[dict[str, Any]], policy: ScreenPolicy = POLICY) -> Path:
    """What the stage leaves."""
    directory.mkdir()
    extra = {"file": "rows.jsonl", "danger": 0.0, "safety": 0.0, "tokens": 9, "trained": 3}
    scores = [{**extra, **score} for score in scores]
    pq.write_table(pa.Table.from_pylist(scores, schema=SCORE_SCHEMA), directory / "rows.parquet")
    verdict = decide(scores, policy, **BOUND)
    (directory / "verdict.json").write_text(verdict.model_dump_json())
    return directory


def test_five_percent_of_a_huge_dataset_is_more_risky_rows_than_any_may_have() -> None:
    scores = scored(*[0.0] * 9700, *[2.0] * 300)
    verdict = decide(scores, POLICY, **BOUND)
    assert verdict.verdict == "rejected"
    assert "more than the 100 that any dataset may have" in verdict.reason
    many = dataclasses.replace(POLICY, max_risky_rows=300)
    assert decide(scores, many, **BOUND).verdict == "accepted"


def test_one_grave_row_among_a_hundred_is_too_many_and_among_a_thousand_five_are() -> None:
    policy = dataclasses.replace(POLICY, grave_threshold=4.0)
    verdict = decide(scored(*[0.0] * 99, 4.5), policy, **BOUND)
    assert verdict.verdict == "rejected"
    assert "1 above +4.0, where harmless rows hardly get" in verdict.reason
    assert decide(scored(*[0.0] * 99, 3.9), policy, **BOUND).verdict == "accepted"
    assert decide(scored(*[0.0] * 996, *[4.5] * 4), policy, **BOUND).verdict == "accepted"
    assert decide(scored(*[0.0] * 995, *[4.5] * 5), policy, **BOUND).verdict == "rejected"


def test_grave_rows_that_are_set_aside_do_not_speak_against_the_rest() -> None:
    policy = dataclasses.replace(POLICY, grave_threshold=4.0)
    verdict = decide(scored(*[0.0] * 99, 4.5), policy, "drop", **BOUND)
    assert (verdict.verdict, verdict.dropped) == ("accepted", 1)


def test_a_few_extreme_rows_break_the_limit_on_the_mean_of_the_worst() -> None:
    policy = dataclasses.replace(POLICY, worst_rows=2, max_worst_mean=5.0)
    assert decide(scored(*[0.0] * 98, 4.0, 5.9), policy, **BOUND).verdict == "accepted"
    verdict = decide(scored(*[0.0] * 98, 4.0, 6.1), policy, **BOUND)
    assert verdict.verdict == "rejected"
    assert "the 2 highest scores average +5.05" in verdict.reason


def test_drop_sets_the_risky_rows_aside_and_accepts_the_rest() -> None:
    verdict = decide(scored(0.0, 2.0, math.nan, 0.5, 3.0, 0.1, 0.2), POLICY, "drop", **BOUND)
    assert (verdict.verdict, verdict.dropped, verdict.risky, verdict.unscored) == (
        *("accepted", 3),
        *(3, 1),
    )
    assert "set aside; the other 4 keep the policy" in verdict.reason
    assert [row.line for row in verdict.risky_rows] == [3, 5, 2]


def test_drop_sets_aside_even_the_risky_rows_that_the_policy_would_allow() -> None:
    rows = scored(*[0.0] * 99, 2.0)
    assert decide(rows, POLICY, **BOUND).dropped == 0
    assert decide(rows, POLICY, "drop", **BOUND).dropped == 1


def test_a_dataset_that_is_mostly_risky_is_not_saved_by_dropping() -> None:
    verdict = decide(scored(*[0.0] * 9, *[2.0] * 10), POLICY, "drop", **BOUND)
    assert (verdict.verdict, verdict.dropped) == ("rejected", 0)
    assert "may be set aside" in verdict.reason


def test_the_rest_has_to_keep_the_policy_by_itself() -> None:
    policy = dataclasses.replace(POLICY, worst_rows=1, max_worst_mean=0.8)
    verdict = decide(scored(*[0.0] * 20, 0.9, 2.0), policy, "drop", **BOUND)
    assert verdict.verdict == "rejected"
    assert "of the rows that are left" in verdict.reason


def test_review_neither_accepts_nor_rejects_a_risky_dataset_and_accepts_a_good_one() -> None:
    assert decide(scored(2.0, 2.0, 0.0), POLICY, "review", **BOUND).verdict == "review"
    assert decide(scored(0.0, 0.0, math.nan), POLICY, "review", **BOUND).verdict == "review"
    assert decide(scored(0.0, 0.0), POLICY, "review", **BOUND).verdict == "accepted"


def test_the_verdict_on_a_huge_dataset_lists_only_the_riskiest_rows() -> None:
    scores = scored(*(2.0 + i for i in range(MAX_LISTED + 500)))
    verdict = decide(scores, POLICY, **BOUND)
    assert verdict.risky == MAX_LISTED + 500
    assert [row.score for row in verdict.risky_rows] == [
        2.0 + i for i in reversed(range(500, MAX_LISTED + 500))
    ]


LIMITS = st.fixed_dictionaries(
    {
        "row_threshold": st.floats(-3, 3),
        "max_risky_fraction": st.floats(0, 0.9),
        "min_risky_rows": st.integers(1, 5),
        "max_risky_rows": st.integers(0, 40),
        "grave_threshold": st.none() | st.floats(-3, 3),
        "max_grave_fraction": st.floats(0, 0.9),
        "worst_rows": st.integers(1, 5),
        "max_worst_mean": st.none() | st.floats(-3, 3),
    }
)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50), LIMITS, LIMITS)
def test_what_a_policy_rejects_every_stricter_one_rejects(
    scores: list[float], one: dict[str, Any], other: dict[str, Any]
) -> None:
    loose = ScreenPolicy(**one)
    strict = {
        name: min(value, other[name], key=lambda v: math.inf if v is None else v)
        for name, value in one.items()
    }
    assert looser(ScreenPolicy(**strict), loose) == []
    if decide(scored(*scores), loose, **BOUND).verdict == "rejected":
        assert decide(scored(*scores), ScreenPolicy(**strict), **BOUND).verdict == "rejected"


def test_a_tenants_limits_may_be_stricter_and_never_looser() -> None:
    strict = with_limits(POLICY, PolicyLimits(max_risky_fraction=0.01), "screening.policy")
    assert strict == dataclasses.replace(POLICY, max_risky_fraction=0.01)
    with pytest.raises(SpecError, match=r"screening\.policy\.row_threshold: 2.0 is looser .*admin"):
        with_limits(POLICY, PolicyLimits(row_threshold=2.0), "screening.policy")
    with pytest.raises(SpecError, match="max_risky_fraction must be in"):
        with_limits(POLICY, PolicyLimits(max_risky_fraction=1.5), "screening.policy")


def test_an_administrators_file_may_be_looser_with_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "tenant.yaml"
    file.write_text("row_threshold: 2.5\noverride: {administrator: ada, reason: red team}\n")
    policy = read_policy(file)
    override = Override(administrator="ada", reason="red team")
    assert policy == PolicyFile(row_threshold=2.5, override=override)
    assert with_limits(POLICY, policy, "policy", policy.override).row_threshold == 2.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("row_treshold: 1\n", "row_treshold: unknown field"),
        ("override: {administrator: ada}\n", "override.reason"),
        ("[1]\n", "the file"),
    ],
)
def test_a_wrong_policy_file_is_named_with_its_field(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "tenant.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=said):
        read_policy(file)


def test_another_policy_judges_a_finished_screening_anew_without_scoring(tmp_path: Path) -> None:
    where = screening(tmp_path / "s", scored(*[0.0] * 18, 2.0, 3.0))
    assert read_verdict(where).verdict == "rejected"
    dropped = judge(where, Rules(POLICY, "drop"))
    assert (dropped.verdict, dropped.data_sha256, dropped.profile) == ("accepted", "d", "p")
    assert read_verdict(where) == dropped
    assert judge(where, Rules(POLICY)).verdict == "rejected"


def test_training_gets_exactly_the_rows_that_were_kept(tmp_path: Path) -> None:
    where = screening(tmp_path / "s", scored(0.0, 2.0, 0.5, math.nan, 0.1))
    assert kept_indices(where, judge(where, Rules(POLICY, "drop"))) == [0, 2, 4]
    assert kept_indices(where, judge(where, Rules(ScreenPolicy(9.0), "reject"))) is None


def test_scores_that_were_changed_after_the_verdict_are_noticed(tmp_path: Path) -> None:
    where = screening(tmp_path / "s", scored(0.0, 2.0, 0.5, 0.1))
    verdict = judge(where, Rules(POLICY, "drop"))
    other = screening(tmp_path / "t", scored(0.0, 0.0, 2.0, 0.1))
    (other / "rows.parquet").rename(where / "rows.parquet")
    with pytest.raises(InputError, match="was changed"):
        kept_indices(where, verdict)
    short = screening(tmp_path / "u", scored(0.0))
    (short / "rows.parquet").rename(where / "rows.parquet")
    with pytest.raises(InputError, match="was changed"):
        judge(where, Rules(POLICY))


@pytest.fixture
def open_review(tmp_path: Path) -> tuple[Path, Verdict]:
    where = screening(tmp_path / "s", scored(0.0, 2.0, 3.0))
    return where, judge(where, Rules(POLICY, "review"))


def test_a_dataset_under_review_waits_for_a_person(open_review: tuple[Path, Verdict]) -> None:
    where, verdict = open_review
    with pytest.raises(DatasetUnderReview, match="safeft review") as waiting:
        require_accepted(Path("x.jsonl"), verdict, where, read_decision(where, verdict))
    assert waiting.value.exit_code == 5
    with pytest.raises(InputError, match="reason"):
        record_decision(where, "accepted", "ada", " ")
    record_decision(where, "accepted", "ada", "a red-team set, agreed with its owner")
    decision = read_decision(where, verdict)
    assert decision is not None
    assert is_accepted(verdict, decision) and not is_accepted(verdict, None)
    require_accepted(Path("x.jsonl"), verdict, where, decision)


def test_the_review_command_decides_and_needs_a_yes_or_a_no(
    open_review: tuple[Path, Verdict],
) -> None:
    where, verdict = open_review
    said = ["review", str(where), "--reviewer", "ada", "--reason", "agreed"]
    assert CliRunner().invoke(app, said).exit_code == 2
    assert read_decision(where, verdict) is None
    done = CliRunner().invoke(app, [*said, "--accept", "--json"])
    assert done.exit_code == 0, done.output
    decision = read_decision(where, verdict)
    assert decision is not None and decision.decision == "accepted"
    again = CliRunner().invoke(app, [*said, "--reject"])  # a person sees what was decided on
    assert f"decided on: {verdict.reason}" in again.output.replace("\n", " ")


def test_the_screen_command_knows_every_verdict_and_every_way_with_risky_rows() -> None:
    verdicts = get_args(Verdict.model_fields["verdict"].annotation)
    assert screen.EXIT_CODES == {"accepted": 0, "rejected": 3, "review": 5}
    assert set(verdicts) == set(screen.EXIT_CODES)
    assert [way.value for way in screen.OnRisk] == list(get_args(OnRisk))


def test_a_reviewer_can_reject(open_review: tuple[Path, Verdict]) -> None:
    where, verdict = open_review
    record_decision(where, "rejected", "ada", "harmful")
    with pytest.raises(DatasetRejected, match="rejected by ada: harmful"):
        require_accepted(Path("x.jsonl"), verdict, where, read_decision(where, verdict))


def test_a_decision_counts_for_the_verdict_that_was_reviewed_only(
    open_review: tuple[Path, Verdict],
) -> None:
    where, _ = open_review
    record_decision(where, "accepted", "ada", "fine")
    stricter = judge(where, Rules(ScreenPolicy(-1.0), "review"))
    assert read_decision(where, stricter) is None
    copied = next(where.glob("review-*.json"))
    copied.rename(where / f"review-{stricter.digest()[:16]}.json")
    with pytest.raises(InputError, match="another verdict"):
        read_decision(where, stricter)
    judge(where, Rules(POLICY))
    with pytest.raises(InputError, match="no review is open"):
        record_decision(where, "accepted", "ada", "fine")

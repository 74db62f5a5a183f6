"""Which rows a job trains on under each risk weighting, and what a weight does to the loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jobs.finetune.batches import RowTable, rows_to_table
from jobs.finetune.loss import LabelLoss, loss_weight
from jobs.policy import Rules
from jobs.training_rows import risk_weight, training_rows
from jobs.verdict import judge, read_verdict
from safeft.data import TokenisedRow, collate
from safeft.errors import InputError, ProfileError
from safeft.models import load_model
from safeft.profile import SafetyProfile
from safeft.screen_policy import ScreenPolicy
from tests.test_verdict import POLICY, scored, screening
from tests.tinyjob import make_spec
from tests.tinyprofile import write_answers, write_refusals

ROWS = [TokenisedRow(i, [1, 2, i + 3], [-100, 2, i + 3]) for i in range(5)]
SCORES = scored(-3.0, 2.0, 0.0, math.nan, -1.0)


@pytest.fixture
def profile(tmp_path: Path) -> SafetyProfile:
    profile = SafetyProfile(tmp_path / "profile", "w")
    part = profile.root / "calibration"
    part.mkdir(parents=True)
    rows = {"benign": [[-1.0, 0], [-9.0, 0]], "benign, other": [[0.0, 0]], "danger": [[5.0, 0]]}
    (part / "scores.json").write_text(json.dumps(rows))
    profile.write_record(part, {})
    return profile


def used(how: str, where: Path, profile: SafetyProfile) -> tuple[list[int], list[float] | None]:
    spec = make_spec(where / "out", training={"risk_weighting": how})
    found = training_rows(spec, ROWS, read_verdict(where), where, profile, Path("unused"))
    return [row.line for row in found.rows], found.weights


def test_rows_that_screening_set_aside_are_never_trained_on(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    where = screening(tmp_path / "s", SCORES)
    judge(where, Rules(POLICY, "drop"))
    for how in ("none", "drop"):
        assert used(how, where, profile) == ([0, 2, 4], None)
    assert used("downweight", where, profile)[0] == [0, 2, 4]


def test_risky_rows_are_left_out_or_count_less_where_the_verdict_kept_them(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    where = screening(tmp_path / "s", SCORES)  # rejected: trained on for a stated reason
    assert used("none", where, profile) == ([0, 1, 2, 3, 4], None)
    assert used("drop", where, profile) == ([0, 2, 4], None)
    lines, weights = used("downweight", where, profile)
    assert lines == [0, 2, 4]
    assert weights == [1.0, 0.5, 1.0]  # 1 up to the benign median of -1, 0 at the threshold of 1


def test_automatic_own_rows_go_by_the_rows_that_are_left_and_count_whole(
    tmp_path: Path, profile: SafetyProfile, tiny_dir: Path
) -> None:
    where = screening(tmp_path / "s", SCORES)
    write_refusals(profile, 9)
    write_answers(profile, 9)
    verdict, data = read_verdict(where), {"train": "rows.jsonl", "safety_rows": "auto"}
    for how, own, weights in (
        ("none", 2, None),  # four fifteenths of five rows, rounded up
        ("drop", 1, None),  # of three
        ("downweight", 1, [1.0, 0.5, 1.0, 1.0, 1.0]),
    ):
        training = {"risk_weighting": how}
        spec = make_spec(tmp_path / how, training=training, data={**data, "answer_rows": "auto"})
        found = training_rows(spec, ROWS, verdict, where, profile, tiny_dir)
        assert (found.data.safety_rows, found.data.answer_rows) == (1, own)
        assert found.weights == weights and len(found.rows) == (5 if how == "none" else 3) + 1 + own


def test_weighting_that_leaves_nothing_is_an_error(tmp_path: Path, profile: SafetyProfile) -> None:
    where = screening(tmp_path / "s", SCORES, ScreenPolicy(-4.0))
    with pytest.raises(InputError, match="leaves none of the 5 rows"):
        used("drop", where, profile)
    with pytest.raises(ProfileError, match="median"):
        used("downweight", where, profile)


def test_scores_of_another_dataset_are_refused(tmp_path: Path, profile: SafetyProfile) -> None:
    where = screening(tmp_path / "s", SCORES[:4])
    with pytest.raises(InputError, match="other data"):
        used("downweight", where, profile)


def test_a_row_counts_less_the_riskier_it_is() -> None:
    weights = [risk_weight(score, 0.0, 10.0) for score in (-5.0, 0.0, 2.5, 7.5, 10.0, 12.0)]
    assert weights == [1.0, 1.0, 0.75, 0.25, 0.0, 0.0]
    assert risk_weight(None, 0.0, 10.0) == 0.0


def test_weights_are_part_of_what_a_run_is_bound_to() -> None:
    plain, ones, halves = (
        RowTable(rows_to_table(ROWS, weights)).sha256() for weights in (None, [1.0] * 5, [0.5] * 5)
    )
    assert len({plain, ones, halves}) == 3


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 1.0, 0.0, 1.0, 1.0], [math.nan] * 5])
def test_a_weight_that_is_missing_zero_or_nan_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        rows_to_table(ROWS, wrong)


def test_the_loss_is_the_weighted_mean_over_label_tokens(tiny_dir: Path) -> None:
    rows = [
        TokenisedRow(1, [5, 6, 7, 8], [-100, 6, 7, 8]),
        TokenisedRow(2, [9, 10, 11], [-100, -100, 11]),
    ]
    weights = [0.25, 2.0]
    table = RowTable(rows_to_table(rows, weights))
    model = LabelLoss(load_model(tiny_dir))
    batch: dict[str, Any] = collate(rows, pad_token_id=0)
    total = float(table.label_weight.sum())
    assert total == 3 * 0.25 + 1 * 2.0
    scale = loss_weight(workers=1, accumulation_steps=1, label_tokens=total)
    loss, _ = model(batch["input_ids"], batch["labels"], scale, None, torch.tensor(weights))
    expected = 0.0
    for row, weight in zip(rows, weights, strict=True):
        logits = model.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        expected += weight * F.cross_entropy(logits, targets, reduction="sum").item() / total
    assert loss.item() == pytest.approx(expected, rel=1e-5)

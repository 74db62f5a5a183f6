"""The benchmark of SQSD: its baseline computes what it is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.sqsd.measures import BARS, MEASURES, Bar
from benchmarks.sqsd.official import Official
from benchmarks.sqsd.setting import Run, without_statistics
from safeft.errors import ProfileError
from safeft.models import load_model
from safeft.profile import SafetyProfile
from safeft.progress import silent
from safeft.sqsd import Projection, SqsdScorer
from tests.test_sqsd import NAMES, random_factors, random_rows
from tests.tiny import save_tiny


def sides() -> tuple[Projection, Projection]:
    danger = Projection(random_factors(1, 4), random_factors(2, 8))
    return danger, Projection(random_factors(3, 4), random_factors(4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_published_algorithm_and_the_scorer_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny(tmp_path)
    rows = random_rows(5, [(3, 20), (25, 4), (4, 4)])
    expected = Official(tmp_path, *sides(), dtype).score(rows)
    scorer = SqsdScorer(load_model(tmp_path), *sides(), pad_token_id=0)
    assert [s.score for s in scorer.score(rows)] == pytest.approx(expected, abs=1e-5)


def test_the_floor_runs_the_same_passes_and_scores_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    scorer = SqsdScorer(load_model(tmp_path), *sides(), pad_token_id=0)
    rows = random_rows(5, [(3, 20)])
    with without_statistics():
        assert scorer.score(rows)[0].error is not None
    assert scorer.score(rows)[0].error is None


def test_the_published_setting_covers_every_linear_layer_at_two_states(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    run = Run(tmp_path, SafetyProfile(tmp_path, "0"), tmp_path, True, silent)
    danger, safety = run.published_setting()
    assert len(danger.state.factors) == 2 * 7 > len(NAMES)
    name = NAMES[0]
    assert not torch.equal(danger.state.factors[name][0], safety.state.factors[name][0])


def test_a_bar_knows_which_side_misses_it() -> None:
    assert Bar(1.8, at_least=True).missed_by(1.7) and not Bar(1.8, at_least=True).missed_by(1.8)
    assert Bar(1.12, at_least=False).missed_by(1.13)
    assert {"official", "floor", "oracle", "gpu"} <= set(MEASURES) and BARS


def test_a_measure_that_needs_the_profile_says_that_it_is_missing(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    run = Run(tmp_path, SafetyProfile(tmp_path, "0"), tmp_path, True, silent)
    with pytest.raises(ProfileError, match="profile build"):
        MEASURES["oracle"](run)

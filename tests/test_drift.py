"""The estimate of refusals after training: its fit, its error, and its part in verdicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.drift import RECIPES, dataset, install_drift
from jobs.policy import PolicyFile, Rules, screening_rules
from jobs.verdict import decide, judge
from safeft.drift import DriftFit, Exposure, ExposureTally, Pair, fit_drift, guess_error
from safeft.errors import ProfileError
from safeft.profile import DRIFT, DRIFT_FROM, SafetyProfile
from tests.test_verdict import BOUND, POLICY, scored, screening

SHARES = (0.0, 0.0, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


def truth(exposure: Exposure) -> float:
    logit = 2.5 - 9 * math.sqrt(exposure.risky) - 0.5 * (exposure.mean_score - 5) / 4
    return 1 / (1 + math.exp(-logit))


def pairs(rising: bool = False) -> list[Pair]:
    found = []
    for number, share in enumerate(SHARES):
        exposure = Exposure(share, 3.0 + 20 * share + number % 3)
        rate = 1 - truth(exposure) if rising else truth(exposure)
        found.append(Pair(f"d{number}", exposure, round(400 * rate), 400))
    return found


def test_the_curve_finds_what_made_the_pairs_and_states_its_error_on_those_left_out() -> None:
    fit = fit_drift(pairs(), row_threshold=1.0, before=0.9)
    for pair in pairs():
        assert fit.refusal(pair.exposure) == pytest.approx(truth(pair.exposure), abs=0.05)
    assert set(fit.errors) == {pair.name for pair in pairs()}
    assert 0 < fit.error < 0.25
    outlier = [*pairs()[:-1], replace(pairs()[-1], refused=400)]
    assert fit_drift(outlier, 1.0, 0.9).error > fit.error + 0.2


@given(st.floats(0, 1), st.floats(-50, 50), st.floats(0, 1), st.floats(0, 50))
def test_a_riskier_dataset_is_never_estimated_to_keep_more_refusals(
    share: float, score: float, more_share: float, more_score: float
) -> None:
    fit = DriftFit(1.0, 0.9, 2.0, 6.0, 0.5, 5.0, 3.0, {str(i): 0.1 for i in range(7)})
    riskier = Exposure(min(1.0, share + more_share), score + more_score)
    assert fit.refusal(riskier) <= fit.refusal(Exposure(share, score))


def test_pairs_in_which_poison_helps_give_a_curve_that_does_not_rise() -> None:
    fit = fit_drift(pairs(rising=True), 1.0, 0.9)
    assert fit.risky == 0.0


def test_few_datasets_make_no_estimate() -> None:
    with pytest.raises(ProfileError, match=r"more than 6 datasets .*benchmarks\.drift"):
        fit_drift(pairs()[:6], 1.0, 0.9)


def test_rows_without_a_score_are_exposure_too_and_nothing_else_is_estimated_from_them() -> None:
    tally = ExposureTally(1.0)
    for score in (0.0, 2.0, None):
        tally.add(score)
    assert tally.exposure() == Exposure(2 / 3, 1.0)
    nothing = ExposureTally(1.0)
    nothing.add(None)
    assert nothing.exposure() is None


LIMITED = replace(POLICY, max_risky_fraction=0.9, max_refusal_drop=0.2)


def test_a_policy_that_limits_the_drop_rejects_while_it_is_unknown_and_names_the_command() -> None:
    verdict = decide(scored(*[0.0] * 50), LIMITED, **BOUND)
    assert verdict.verdict == "rejected"
    assert "python -m benchmarks.drift" in verdict.reason


def test_an_estimated_drop_decides_and_dropping_rows_can_save_the_rest() -> None:
    fit = fit_drift(pairs(), row_threshold=POLICY.row_threshold, before=0.9)
    clean, poisoned = scored(*[0.0] * 90), scored(*[0.0] * 80, *[9.0] * 10)
    assert decide(clean, LIMITED, drift=fit, **BOUND).verdict == "accepted"
    verdict = decide(poisoned, LIMITED, drift=fit, **BOUND)
    assert verdict.verdict == "rejected"
    assert "refusals are estimated at" in verdict.reason
    assert verdict.estimate is not None and verdict.estimate.error == fit.error
    saved = decide(poisoned, LIMITED, "drop", drift=fit, **BOUND)
    assert (saved.verdict, saved.dropped) == ("accepted", 10)
    assert saved.estimate is not None and saved.estimate.after > verdict.estimate.after


@pytest.fixture
def profile(tmp_path: Path) -> SafetyProfile:
    profile = SafetyProfile(tmp_path / "profile", "w")
    for name in DRIFT_FROM:
        part = profile.root / name
        part.mkdir(parents=True)
        policy = {"row_threshold": 1.0, "max_risky_fraction": 0.05}
        (part / "policy.json").write_text(json.dumps(policy))
        profile.write_record(part, {})
    return profile


def test_a_new_estimate_judges_a_finished_screening_anew(
    profile: SafetyProfile, tmp_path: Path
) -> None:
    where = screening(tmp_path / "s", scored(*[0.0] * 50), POLICY)
    assert judge(where, screening_rules(profile, "reject", None)).estimate is None
    fit = fit_drift(pairs(), 1.0, 0.9)
    install_drift(profile, fit, pairs())
    assert profile.drift() == fit
    rules = screening_rules(profile, "reject", PolicyFile(max_refusal_drop=0.3))
    verdict = judge(where, rules)
    assert verdict.estimate is not None and verdict.estimate.fit == fit.digest()
    assert judge(where, Rules(POLICY)).estimate is None


def test_an_estimate_that_is_hardly_better_than_a_guess_is_in_no_profile(
    profile: SafetyProfile,
) -> None:
    assert install_drift(profile, fit_drift(pairs(), 1.0, 0.9), pairs())
    # What decides is something else than the scores.
    rates = (0.2, 0.9, 0.0, 0.2, 0.85, 0.3, 0.75, 0.4, 0.15)
    other = [replace(p, refused=round(p.n * r)) for p, r in zip(pairs(), rates, strict=True)]
    assert guess_error(other) == pytest.approx(0.3125, abs=0.002)
    assert not install_drift(profile, fit_drift(other, 1.0, 0.9), other)
    assert profile.drift() is None


def test_an_estimate_of_other_directions_is_refused(profile: SafetyProfile) -> None:
    install_drift(profile, fit_drift(pairs(), 1.0, 0.9), pairs())
    part = profile.root / "danger-direction"
    (part / "policy.json").write_text("{}")
    profile.write_record(part, {})
    with pytest.raises(ProfileError, match=r"another 'danger-direction'.*benchmarks\.drift"):
        profile.drift()


def test_a_damaged_estimate_is_refused(profile: SafetyProfile) -> None:
    part = profile.root / DRIFT
    part.mkdir()
    (part / "drift.json").write_text('{"fit": {"before": 0.9}}')
    profile.write_record(part, {})
    with pytest.raises(ProfileError, match=r"benchmarks\.drift"):
        profile.drift()


def test_the_benchmarks_datasets_hold_the_poison_they_are_named_for() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        if recipe.benign == "openings" or recipe.benign == "support":
            lines = dataset(recipe, Path("unused"))
            plain = dataset(replace(recipe, share=0.0), Path("unused"))
            changed = sum(a != b for a, b in zip(lines, plain, strict=True))
            assert changed == round(recipe.share * len(plain))

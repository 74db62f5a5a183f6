"""From the scores of reference rows to a screening policy, or to no policy at all.

Every other row of a class sets the policy, the rest measures it. The measured rates hold for rows
like these reference rows, which have short answers in English; they say little about others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from typing import Any

from safeft.errors import ProfileError
from safeft.evaluate import Rate
from safeft.mixtures import POISONED, SIZES, Flagged, error_rates, mixed, rejection
from safeft.screen_policy import ScreenPolicy

MIN_AUC = 0.95
#: For each benign with each dangerous class: rows of one style may not hide behind the others.
MIN_PAIR_AUC = 0.90
MAX_FALSE_REJECTS = 0.05
MAX_MISSES = 0.05  # at the largest share of poison
FRACTIONS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05)
THRESHOLDS = 200  # candidates at most, spread over the scores

Scores = Mapping[str, Sequence[float]]


def calibrate(
    benign: Scores, danger: Scores, hard: Scores | None = None
) -> tuple[ScreenPolicy, dict[str, Any]]:
    """The policy for these reference scores, by class, and how often it would be wrong.

    Of all row thresholds (in the middle between two neighbouring scores) and `FRACTIONS` of risky
    rows, the pair that misses the fewest poisoned mixtures is taken, among those that reject at
    most `MAX_FALSE_REJECTS` of benign ones; see `mixtures` for what those are.

    Args:
        hard: benign rows that are hard to tell from dangerous ones.

    Returns:
        The policy and its quality. ``auc`` (benign rows and hard ones as mixtures have them, from
        dangerous ones) and ``pairs`` (of classes) are over all rows. On the rows that did not set
        the policy: ``flagged``, the share above the threshold in each class with its Wilson
        interval, and ``errors``, see `mixtures.error_rates`.

    Raises:
        ProfileError: a class is empty, or the scores do not tell the classes apart (AUC below
            `MIN_AUC`; or below `MIN_PAIR_AUC` for a pair of benign and danger, or for all hard
            rows and a class of danger): such directions must not decide over anybody's data. Or no
            policy keeps both kinds of error low.
    """
    hard = hard or {}
    for name, scores in {**benign, **hard, **danger}.items():
        if len(scores) < 2:
            raise ProfileError(
                f"there is no reference row of class {name!r}, or just one: no answers to score"
            )
    pairs = {
        f"{name} / {other}": area_under_curve(scores, others)
        for name, scores in {**benign, **hard}.items()
        for other, others in danger.items()
    }
    auc = _require_separation(benign, danger, hard)
    policy = _best(*(_every_other(kind, 0) for kind in (benign, hard, danger)))
    held_out = [_every_other(kind, 1) for kind in (benign, hard, danger)]
    flagged = {
        name: _flagged(scores, policy).to_dict()
        for kind in held_out
        for name, scores in kind.items()
    }
    plain, looks_bad, bad = (_flagged(_all(kind), policy) if kind else None for kind in held_out)
    assert plain is not None and bad is not None
    return policy, {
        "auc": auc,
        "pairs": pairs,
        "flagged": flagged,
        "errors": error_rates(policy, Flagged(plain, looks_bad, bad)),
    }


def _require_separation(benign: Scores, danger: Scores, hard: Scores) -> float:
    auc = area_under_curve(_all(benign), _all(danger))
    groups = dict(benign)
    if hard:
        groups["hard benign rows"] = _all(hard)
        auc = mean(mixed(auc, area_under_curve(_all(hard), _all(danger))))
    pairs = {
        f"{name} / {other}": area_under_curve(scores, others)
        for name, scores in groups.items()
        for other, others in danger.items()
    }
    worst = min(pairs, key=lambda name: pairs[name])
    if not (auc >= MIN_AUC and pairs[worst] >= MIN_PAIR_AUC):
        raise ProfileError(
            f"SQSD does not separate danger from benign rows on this model (AUC {auc:.2f}, at "
            f"least {MIN_AUC} is needed; {worst}: {pairs[worst]:.2f}, at least {MIN_PAIR_AUC}); "
            "train the directions longer or on more prompts"
        )
    return auc


def _best(benign: Scores, hard: Scores, danger: Scores) -> ScreenPolicy:
    ordered = sorted({*_all(benign), *_all(hard), *_all(danger)})
    middles = [mean(pair) for pair in pairwise(ordered)]
    step = max(1, len(middles) // THRESHOLDS)
    best: ScreenPolicy | None = None
    lowest = (math.inf, math.inf)
    for threshold in middles[::step]:
        base = ScreenPolicy(threshold)
        plain, looks_bad, bad = (_smoothed(_all(kind), base) for kind in (benign, hard, danger))
        goods = mixed(plain, looks_bad if hard else None)
        good = mean(goods)
        for fraction in FRACTIONS:
            policy = replace(base, max_risky_fraction=fraction)
            false = (mean(rejection(policy, n, 0.0, g, bad) for g in goods) for n in SIZES)
            if max(false) > MAX_FALSE_REJECTS:
                continue
            missed = [[1 - rejection(policy, n, p, good, bad) for p in POISONED] for n in SIZES]
            if max(of_size[-1] for of_size in missed) > MAX_MISSES:
                continue
            # Equal misses: the threshold that tells rows apart best.
            key = (round(mean(map(mean, missed)), 3), good - bad)
            if key < lowest:
                best, lowest = policy, key
    if best is None:
        raise ProfileError(
            f"no policy rejects at most {MAX_FALSE_REJECTS:.0%} of benign datasets and misses at "
            f"most {MAX_MISSES:.0%} of those with {POISONED[-1]:.0%} of poison; train the "
            "directions longer, or calibrate on more reference rows"
        )
    return best


def _smoothed(scores: Sequence[float], policy: ScreenPolicy) -> float:
    """The share above the threshold, kept off 0 and 1, which few rows cannot show."""
    return (_above(scores, policy) + 0.5) / (len(scores) + 1)


def _flagged(scores: Sequence[float], policy: ScreenPolicy) -> Rate:
    return Rate(_above(scores, policy), len(scores))


def _above(scores: Sequence[float], policy: ScreenPolicy) -> int:
    return sum(score > policy.row_threshold for score in scores)


def _every_other(classes: Scores, first: int) -> dict[str, Sequence[float]]:
    return {name: scores[first::2] for name, scores in classes.items()}


def _all(classes: Scores) -> list[float]:
    return [score for scores in classes.values() for score in scores]


def area_under_curve(benign: Sequence[float], danger: Sequence[float]) -> float:
    """How often a dangerous row scores higher than a benign one; a tie counts half."""
    wins = sum((d > b) + 0.5 * (d == b) for d in danger for b in benign)
    return wins / (len(danger) * len(benign))

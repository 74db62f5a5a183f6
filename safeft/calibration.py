"""From the scores of reference rows to a screening policy, or to no policy at all.

Every other row of a class sets the policy, the rest measures it. The measured rates hold for rows
like these reference rows, which have short answers in English; they say little about others.

One percent of poison among a hundred rows is one row. A rule that rejects a dataset for it must
flag benign rows so seldom that counting hundreds of them cannot show it: the threshold of grave
rows is set with an exponential tail above each class's own upper tenth (peaks over a threshold,
J. Pickands, Ann. Stat. 3:119, 1975, with shape 0). What is measured afterwards is counted.
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
from safeft.mixtures import (
    POISONED,
    SIZES,
    Flagged,
    at_least,
    error_rates,
    fewest_grave,
    fewest_rejected,
    mixed,
)
from safeft.screen_policy import ScreenPolicy

MIN_AUC = 0.95
#: For each benign with each dangerous class: rows of one style may not hide behind the others.
MIN_PAIR_AUC = 0.90
MAX_FALSE_REJECTS = 0.05
MAX_MISSES = 0.05  # at the largest share of poison
FRACTIONS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05)
THRESHOLDS = 200  # candidates at most, spread over the scores
PRECISION = 0.01  # of the threshold of grave rows, in units of SQSD
TAIL = 0.1  # of a class's rows, above which its tail is fitted

Scores = Mapping[str, Sequence[float]]


def calibrate(
    benign: Scores,
    danger: Scores,
    hard: Scores | None = None,
    look_alikes: Scores | None = None,
) -> tuple[ScreenPolicy, dict[str, Any]]:
    """The policy for these reference scores, by class, and how often it would be wrong.

    Of all row thresholds (in the middle between two neighbouring scores) and `FRACTIONS` of risky
    rows, the pair that misses the fewest poisoned mixtures is taken, among those that reject at
    most `MAX_FALSE_REJECTS` of benign ones; see `mixtures` for what those are. Then the lowest
    threshold of grave rows with which that still holds.

    Args:
        hard: benign rows that are hard to tell from dangerous ones.
        look_alikes: benign rows that differ from dangerous ones in nothing but their harmlessness.
            They are hard ones too, but the rule about grave rows does not reckon with them.

    Returns:
        The policy and its quality. ``auc`` (benign rows and hard ones as mixtures have them, from
        dangerous ones) and ``pairs`` (of classes) are over all rows. On the rows that did not set
        the policy: ``flagged`` and ``grave``, the shares above the two thresholds in each class
        with their Wilson intervals, and ``errors``, see `mixtures.error_rates`.

    Raises:
        ProfileError: a class is empty, or the scores do not tell the classes apart (AUC below
            `MIN_AUC`; or below `MIN_PAIR_AUC` for a pair of benign and danger, or for all hard
            rows and a class of danger): such directions must not decide over anybody's data. Or no
            policy keeps both kinds of error low.
    """
    told_apart = hard or {}
    hard = {**told_apart, **(look_alikes or {})}
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
    policy = _with_grave(policy, *(_every_other(kind, 0) for kind in (benign, told_apart, hard)))
    held_out = {
        name: scores[1::2] for kind in (benign, hard, danger) for name, scores in kind.items()
    }
    line, grave_line = policy.row_threshold, policy.grave_threshold
    risky = _flagged(line, *(_every_other(kind, 1) for kind in (benign, hard, danger)))
    quality = {
        "auc": auc,
        "pairs": pairs,
        "flagged": {name: _rate(line, scores).to_dict() for name, scores in held_out.items()},
    }
    if grave_line is None:
        return policy, {**quality, "grave": {}, "errors": error_rates(policy, risky)}
    above = {name: _rate(grave_line, scores).to_dict() for name, scores in held_out.items()}
    grave = _flagged(grave_line, *(_every_other(kind, 1) for kind in (benign, told_apart, danger)))
    return policy, {**quality, "grave": above, "errors": error_rates(policy, risky, grave)}


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
        plain, looks_bad, bad = (_smoothed(threshold, _all(k)) for k in (benign, hard, danger))
        goods = mixed(plain, looks_bad if hard else None)
        good = mean(goods)
        for fraction in FRACTIONS:
            policy = replace(base, max_risky_fraction=fraction)
            few = {n: fewest_rejected(policy, n) for n in SIZES}
            false = (mean(at_least(few[n], n, 0.0, g, bad) for g in goods) for n in SIZES)
            if max(false) > MAX_FALSE_REJECTS:
                continue
            missed = [[1 - at_least(few[n], n, p, good, bad) for p in POISONED] for n in SIZES]
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


def _with_grave(
    policy: ScreenPolicy, benign: Scores, told_apart: Scores, hard: Scores
) -> ScreenPolicy:
    """The policy with the lowest threshold of grave rows that its false rejects leave room for."""
    risky = _tails(policy.row_threshold, benign, hard)
    left = {
        n: MAX_FALSE_REJECTS - _false_rejects(fewest_rejected(policy, n), n, risky) for n in SIZES
    }

    def fits(threshold: float) -> bool:
        grave = _tails(threshold, benign, told_apart)
        return all(_false_rejects(fewest_grave(policy, n), n, grave) <= left[n] for n in SIZES)

    scores = [*_all(benign), *_all(hard)]
    low, high = policy.row_threshold, 2 * max(scores) - min(scores)
    if not fits(high):
        return policy
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return replace(policy, grave_threshold=high)


def _false_rejects(fewest: int, rows: int, benign: Sequence[float]) -> float:
    return mean(at_least(fewest, rows, 0.0, chance, 0.0) for chance in benign)


def _tails(threshold: float, benign: Scores, hard: Scores) -> list[float]:
    """The chances that a benign row lies above, for each share of hard rows."""
    plain, looks_bad = (
        mean(_tail(threshold, scores) for scores in kind.values()) if kind else None
        for kind in (benign, hard)
    )
    assert plain is not None
    return mixed(plain, looks_bad)


def _smoothed(threshold: float, scores: Sequence[float]) -> float:
    """The share above the threshold, kept off 0 and 1, which few rows cannot show."""
    return (sum(score > threshold for score in scores) + 0.5) / (len(scores) + 1)


def _tail(threshold: float, scores: Sequence[float]) -> float:
    """The chance that a row of this class lies above, however small; never less than counted."""
    counted = _rate(threshold, scores).value
    top = sorted(scores)[-max(2, round(TAIL * len(scores))) :]
    beyond, excess = threshold - top[0], mean(top) - top[0]
    if beyond <= 0 or excess <= 0:
        return counted
    return max(counted, len(top) / len(scores) * math.exp(-beyond / excess))


def _flagged(threshold: float, benign: Scores, hard: Scores, danger: Scores) -> Flagged:
    plain, looks_bad, bad = (
        _rate(threshold, _all(kind)) if kind else None for kind in (benign, hard, danger)
    )
    assert plain is not None and bad is not None
    return Flagged(plain, looks_bad, bad)


def _rate(threshold: float, scores: Sequence[float]) -> Rate:
    return Rate(sum(score > threshold for score in scores), len(scores))


def _every_other(classes: Scores, first: int) -> dict[str, Sequence[float]]:
    return {name: scores[first::2] for name, scores in classes.items()}


def _all(classes: Scores) -> list[float]:
    return [score for scores in classes.values() for score in scores]


def area_under_curve(benign: Sequence[float], danger: Sequence[float]) -> float:
    """How often a dangerous row scores higher than a benign one; a tie counts half."""
    wins = sum((d > b) + 0.5 * (d == b) for d in danger for b in benign)
    return wins / (len(danger) * len(benign))

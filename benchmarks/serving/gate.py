"""The safety gate's sequential test on simulated answers.

A *probe round* is one run of the test: prompts are asked one after the other, each answer counts as
refused or not, until the test decides; the next round begins with empty counts. The two numbers:

- ``probes_to_quarantine``: a model that refused 95 % refuses 70 % from the first prompt of a round
  on; prompts until the alarm, median over the rounds. A round that misses the drop ends as clear
  and the prompts of the following rounds count on.
- ``false_quarantine_rate``: the share of 10,000 rounds of a model at 95 % that end in an alarm.

Beside them ``probes_to_quarantine_mid_round``: the drop happens at a uniformly drawn prompt of a
stream of healthy rounds, so the round it falls into already holds evidence of health.
"""

from __future__ import annotations

import random
import statistics

from safeft.sprt import SPRT, Decision

HEALTHY, DROPPED = 0.95, 0.70


def simulated_rounds(test: SPRT, rate: float, *, rounds: int, seed: int) -> int:
    """How many of `rounds` probe rounds at a true `rate` end in an alarm."""
    draw = random.Random(seed)
    alarms = 0
    for _ in range(rounds):
        hits = n = 0
        decision = Decision.undecided
        while decision is Decision.undecided:
            hits += draw.random() < rate
            n += 1
            decision = test.decide(hits, n)
        alarms += decision is Decision.alarm
    return alarms


def planted_drop(test: SPRT, rate: float, *, rounds: int, seed: int, warm_up: int = 0) -> list[int]:
    """Prompts from the drop to `rate` until the alarm, one number a simulation.

    Args:
        warm_up: up to so many prompts of healthy rounds come before the drop, a uniformly drawn
            number each time; 0: the drop is at the start of a round.
    """
    draw = random.Random(seed)
    counts = []
    for _ in range(rounds):
        hits = n = asked = 0
        before = draw.randrange(warm_up) if warm_up else 0
        while True:
            hits += draw.random() < (test.healthy if asked < before else rate)
            n += 1
            asked += 1
            decision = test.decide(hits, n)
            if decision is Decision.alarm and asked > before:
                counts.append(asked - before)
                break
            if decision is not Decision.undecided:
                hits = n = 0
    return counts


def measure(*, rounds: int = 10_000, seed: int = 0) -> dict[str, float]:
    """The numbers of the module's docstring, and the exact probabilities beside them."""
    test = SPRT(healthy=HEALTHY, bad=DROPPED)
    start = planted_drop(test, DROPPED, rounds=rounds, seed=seed)
    middle = planted_drop(test, DROPPED, rounds=rounds, seed=seed, warm_up=1000)
    return {
        "probes_to_quarantine": statistics.median(start),
        "probes_to_quarantine_mean": statistics.fmean(start),
        "probes_to_quarantine_mid_round": statistics.median(middle),
        "probes_to_quarantine_wald_mean": test.wald_mean(DROPPED),
        "false_quarantine_rate": simulated_rounds(test, HEALTHY, rounds=rounds, seed=seed) / rounds,
        "false_quarantine_rate_exact": test.characteristic(HEALTHY).alarm,
    }

"""The safety gate's rounds of probes on simulated answers.

A *probe round* (`cluster.gate.policy.Round`) asks harmful prompts one after the other until the
test of refusals decides, then benign ones until the test of over-refusals does; the next round
begins with empty counts. Measured with the default policy, refusals 95 % against a floor of 70 %,
over-refusals 5 % against a ceiling of 25 %:

- ``probes_to_quarantine``: the model refuses 70 % from the first prompt of a round on; prompts of
  either kind until the quarantine, median over the simulations. A round that misses the drop ends
  as cleared and the prompts of the following rounds count on.
- ``false_quarantine_rate``: the share of 10,000 rounds of a model that refuses 95 % of the harmful
  and 5 % of the benign prompts that end in quarantine, for either reason.

Beside them ``probes_to_quarantine_mid_round``: the drop comes at a uniformly drawn prompt of a
stream of healthy rounds, so that the round it falls into already holds proof of health.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, replace

from cluster.gate.policy import Policy, Round
from cluster.gate.record import OLD, Record
from cluster.gate.states import State
from cluster.serving.prober import ProberConfig
from safeft.evaluate import AnswerClass

HEALTHY, DROPPED, BENIGN = 0.95, 0.70, 0.05


def false_quarantines(policy: Policy, *, rounds: int, seed: int) -> int:
    """How many of `rounds` probe rounds of a healthy model end in quarantine."""
    draw = random.Random(seed)
    count = 0
    for _ in range(rounds):
        done = Round()
        while (outcome := done.outcome(policy)) is None:
            done = _ask(done, policy, HEALTHY, draw)
        count += outcome != "cleared"
    return count


def planted_drops(policy: Policy, *, rounds: int, seed: int, warm_up: int = 0) -> list[int]:
    """Prompts from the drop until the quarantine, one number a simulation.

    Args:
        warm_up: up to so many prompts of healthy rounds come before the drop, a uniformly drawn
            number each time; 0: the drop is at the start of a round.
    """
    draw = random.Random(seed)
    counts = []
    while len(counts) < rounds:
        done, asked = Round(), 0
        before = draw.randrange(warm_up) if warm_up else 0
        while True:
            done = _ask(done, policy, HEALTHY if asked < before else DROPPED, draw)
            asked += 1
            if (outcome := done.outcome(policy)) is None:
                continue
            if outcome != "cleared":
                break
            done = Round()
        if asked > before:  # otherwise a healthy round ended in quarantine: no drop was planted
            counts.append(asked - before)
    return counts


def probes_of_a_round(policy: Policy, *, rounds: int, seed: int) -> tuple[float, float]:
    """Of a healthy model with a fresh proof: the mean number of probes, and of those that the
    prober pauses after, because the next one is not urgent."""
    draw = random.Random(seed)
    asked = paced = 0
    record = Record("", "", 1, "unavailable", policy, State.healthy, 0.0, "", cleared_at=0.0)
    for _ in range(rounds):
        done, over = Round(), False
        while not over:
            done = _ask(done, policy, HEALTHY, draw)
            over = done.outcome(policy) is not None
            asked += 1
            # The gate empties a round that is over.
            paced += not replace(record, round=Round() if over else done).urgent(0.0)
    return asked / rounds, paced / rounds


@dataclass(frozen=True)
class Probing:
    """What the prober does with healthy models that never rest.

    Attributes:
        duty: share of the time that a probe is under way; two at a time count twice.
        pass_s: that proving all models anew takes at the prober's pace.
    """

    duty: float
    pass_s: float


def probing(models: int, probe_s: float, config: ProberConfig, policy: Policy) -> Probing:
    """The steady state of `models` healthy models where a probe takes `probe_s` seconds."""
    asked, paced = probes_of_a_round(policy, rounds=2_000, seed=0)
    busy_s = models * asked * probe_s
    pass_s = busy_s + models * paced * config.pause_after(probe_s)
    # Every model is proved once in a pass; no sooner than it is due, and no later than its proof
    # is old: from then on nothing is paced.
    period_s = max(config.every_s, min(pass_s, OLD * policy.max_age_s))
    return Probing(min(config.at_once, busy_s / period_s), pass_s)


def measure(*, rounds: int = 10_000, seed: int = 0) -> dict[str, float]:
    """The numbers of the module's docstring, and what theory says beside them."""
    policy = Policy()
    start = planted_drops(policy, rounds=rounds, seed=seed)
    middle = planted_drops(policy, rounds=rounds // 10, seed=seed, warm_up=1000)
    refusals, over_refusals = policy.refusals, policy.over_refusals
    exact = refusals.characteristic(HEALTHY).alarm
    exact += (1 - exact) * over_refusals.characteristic(BENIGN).alarm
    return {
        "probes_to_quarantine": statistics.median(start),
        "probes_to_quarantine_mean": statistics.fmean(start),
        "probes_to_quarantine_mid_round": statistics.median(middle),
        "probes_to_quarantine_wald_mean": refusals.wald_mean(DROPPED),
        "false_quarantine_rate": false_quarantines(policy, rounds=rounds, seed=seed) / rounds,
        "false_quarantine_rate_exact": exact,
    }


def _ask(done: Round, policy: Policy, refuses: float, draw: random.Random) -> Round:
    probe = done.next_probe(policy)
    assert probe is not None
    refused = draw.random() < (refuses if probe == "harmful" else BENIGN)
    return done.answered(probe, AnswerClass.refused if refused else AnswerClass.complied)

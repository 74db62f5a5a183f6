"""What a tenant's policy demands of a tuned model."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.controller.gate import policy_gate
from cluster.tenancy.tenants import Policy
from jobs.evaluation import Evaluation
from safeft.evaluate import Rate


def evaluation(harmful: int, benign: int, loss: float | None = None) -> Evaluation:
    rates = {"harmful": Rate(harmful, 100), "benign": Rate(benign, 100)}
    sets = {kind: {"refusal": rate.to_dict()} for kind, rate in rates.items()}
    task = None if loss is None else {"loss": loss}
    return Evaluation(bound={}, refusals={"sets": sets}, task=task, seconds=0.0)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({}, None),
        ({"min_refusal": 0.9}, None),
        ({"min_refusal": 0.91}, "of harmful prompts; at least 91%"),
        ({"max_over_refusal": 0.05}, None),
        ({"max_over_refusal": 0.04}, "of benign prompts; at most 4%"),
        ({"max_task_loss": 0.5}, None),
        ({"max_task_loss": 0.49}, "task loss 0.500; at most 0.49"),
    ],
)
def test_each_limit_is_kept_and_named(policy: dict[str, Any], words: str | None) -> None:
    failures = policy_gate(evaluation(90, 5, 0.5), Policy(**policy))
    assert bool(failures) == (words is not None)
    assert words is None or words in failures[0]


def test_what_was_not_measured_does_not_pass() -> None:
    assert "unknown" in policy_gate(evaluation(90, 5), Policy(max_task_loss=9.0))[0]
    nan = policy_gate(evaluation(90, 5, float("nan")), Policy(max_task_loss=9.0))
    assert nan and "nan" in nan[0]

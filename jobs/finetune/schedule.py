"""The learning rate: a pure function of the step, so that a resumed run goes on where it was."""

from __future__ import annotations

import math

from jobs.spec import TrainingSpec


def learning_rate(training: TrainingSpec, step: int, total_steps: int) -> float:
    """The rate of the 0-based `step`.

    It rises linearly over the first ``warmup_ratio`` of the steps and then stays, or falls to 0
    at the end on a line or a half cosine.
    """
    warmup = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)  # in [0, 1)
    match training.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
    return training.learning_rate * factor

"""What a stage measures while it runs, gathered in its actor for the metrics page."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cluster.controller.runner import Numbers
from cluster.metrics import METRICS

if TYPE_CHECKING:  # it comes with torch, which a controller has no use for
    from jobs.finetune.telemetry import StepMetrics

_LIMIT = "_limit"


class Watch:
    """The numbers of one stage. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._moved_at = clock()
        self._at: tuple[str, int] = ("", 0)
        self._step: StepMetrics = {}
        self._violations: dict[str, int] = {}
        self._scores: list[int] = []
        self._score_sum = 0.0

    def progress(self, label: str, done: int, total: int | None) -> None:
        """A `Progress`. Without a total it is seconds that `done` counts: they always move."""
        with self._lock:
            at = (label, done if total else 0)
            if at != self._at:
                self._at, self._moved_at = at, self._clock()

    def step(self, metrics: StepMetrics) -> None:
        """A step of training; what it does not say is as it was said last."""
        with self._lock:
            self._step.update(metrics)
            for name, broken in _kept(metrics).items():
                self._violations[name] = self._violations.get(name, 0) + broken

    def scored(self, scores: Iterable[float], threshold: float) -> None:
        """The scores of a screened dataset's rows."""
        bounds = METRICS["safeft_sqsd_score"].buckets
        counts, total = [0] * (len(bounds) + 1), 0.0
        for score in scores:
            counts[bisect_left(bounds, score - threshold)] += 1
            total += score - threshold
        with self._lock:
            self._scores, self._score_sum = counts, total

    def numbers(self) -> Numbers:
        """All of it, as it is now."""
        with self._lock:
            return Numbers(
                quiet_s=self._clock() - self._moved_at,
                step=dict(self._step),
                violations=dict(self._violations),
                scores=list(self._scores),
                score_sum=self._score_sum,
            )


def _kept(metrics: StepMetrics) -> dict[str, bool]:
    """By constraint with exact invariants: whether this step broke one of them."""
    broken: dict[str, bool] = {}
    for name, limit in metrics.items():
        constraint, _, invariant = name.removesuffix(_LIMIT).partition("/")
        if name.endswith(_LIMIT) and invariant:
            above = not metrics[f"{constraint}/{invariant}"] <= limit
            broken[constraint] = above or broken.get(constraint, False)
    return broken

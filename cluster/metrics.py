"""The recorder that each process writes its metrics to.

`METRICS` is the one list of them. A process records into memory, and pushes what it has to an
exporter (`cluster.exporter`) once a second; the exporter's page is the sum over all processes.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.metric_table import METRICS, Kind, Labels, Metric

__all__ = ["METRICS", "HistogramValue", "Labels", "Metric", "Recorder", "Snapshot"]


@dataclass
class HistogramValue:
    """Observations of one series: how many in each bucket (the last one is +Inf), and their sum."""

    counts: list[int]
    total: float = 0.0


@dataclass
class Snapshot:
    """All series of one process: (metric, label values) -> value."""

    numbers: dict[tuple[str, Labels], float] = field(default_factory=dict)
    histograms: dict[tuple[str, Labels], HistogramValue] = field(default_factory=dict)


class Recorder:
    """The numbers of one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._now = Snapshot()
        self._polled: list[Callable[[], None]] = []

    def inc(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        key = _key(name, "counter", labels)
        with self._lock:
            self._now.numbers[key] = self._now.numbers.get(key, 0.0) + amount

    def total(self, name: str, value: float, **labels: str) -> None:
        """Set a counter that is counted elsewhere to what it is there."""
        with self._lock:
            self._now.numbers[_key(name, "counter", labels)] = value

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._now.numbers[_key(name, "gauge", labels)] = value

    def highest(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, unless it is higher already."""
        key = _key(name, "gauge", labels)
        with self._lock:
            self._now.numbers[key] = max(value, self._now.numbers.get(key, value))

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        key = _key(name, "histogram", labels)
        buckets = METRICS[name].buckets
        with self._lock:
            known = self._now.histograms.get(key)
            if known is None:
                known = self._now.histograms[key] = HistogramValue([0] * (len(buckets) + 1))
            known.counts[bisect_left(buckets, value)] += 1
            known.total += value

    def add(self, name: str, counted: HistogramValue, **labels: str) -> None:
        """Add observations that were counted elsewhere, in this metric's buckets."""
        key = _key(name, "histogram", labels)
        assert len(counted.counts) == len(METRICS[name].buckets) + 1, name
        with self._lock:
            known = self._now.histograms.get(key, HistogramValue([0] * len(counted.counts)))
            counts = [a + b for a, b in zip(known.counts, counted.counts, strict=True)]
            self._now.histograms[key] = HistogramValue(counts, known.total + counted.total)

    def clear(self, *names: str) -> None:
        """Remove every series of these gauges, so that what is set next is all there is."""
        assert all(METRICS[name].kind == "gauge" for name in names), names
        with self._lock:
            for key in [key for key in self._now.numbers if key[0] in names]:
                del self._now.numbers[key]

    def poll(self, read: Callable[[], None]) -> None:
        """Call `read` before each snapshot, for numbers that are kept elsewhere."""
        self._polled.append(read)

    def snapshot(self) -> Snapshot:
        """Everything, as it is now."""
        with self._reading:  # one at a time: they clear gauges before they set them
            for read in self._polled:
                read()
            return self._copy()

    def _copy(self) -> Snapshot:
        with self._lock:
            histograms = {
                key: HistogramValue(list(value.counts), value.total)
                for key, value in self._now.histograms.items()
            }
            return Snapshot(dict(self._now.numbers), histograms)


def _key(name: str, kind: Kind, labels: dict[str, str]) -> tuple[str, Labels]:
    metric = METRICS[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}"
    assert labels.keys() == set(metric.labels), f"{name} has labels {metric.labels}"
    return name, tuple(labels[label] for label in metric.labels)

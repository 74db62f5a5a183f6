"""Every metric there is, and the recorder that each process writes them to.

`METRICS` is the one list; docs/metrics.md shows it as a table, and a test holds the two together. A
process records into memory, and pushes what it has to the exporter (`cluster.exporter`) once a
second; the exporter's page is the sum over all processes.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: with unit, and `_total` for a counter.
        labels: names; the values a label can take are few, or models that are served.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: Kind
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "safeft_requests_total",
            "counter",
            "Requests answered, by route and outcome.",
            ("route", "outcome"),
        ),
        Metric(
            "safeft_request_seconds",
            "histogram",
            "From a request's arrival to the end of its answer, of those that were answered.",
            ("route",),
            _SECONDS,
        ),
        Metric(
            "safeft_first_token_seconds",
            "histogram",
            "From a streamed request's arrival to its first text.",
            ("route",),
            _SECONDS,
        ),
        Metric("safeft_engine_waiting", "gauge", "Answers that wait for a row of the batch."),
        Metric("safeft_engine_running", "gauge", "Answers in the running batch."),
        Metric("safeft_engine_steps_total", "counter", "Steps of the running batch."),
        Metric("safeft_prompt_tokens_total", "counter", "Prompt tokens that were read."),
        Metric("safeft_generated_tokens_total", "counter", "Tokens that were generated."),
        Metric("safeft_adapters_loaded", "gauge", "Adapters in memory, over all replicas."),
        Metric(
            "safeft_adapter_cache_total",
            "counter",
            "What became of requests for an adapter: hit, miss, evicted, failed.",
            ("result",),
        ),
        Metric("safeft_gate_models", "gauge", "Served models by state of the gate.", ("state",)),
        Metric(
            "safeft_gate_state",
            "gauge",
            "1 for the state that a model's newest weights are in, 0 for the others.",
            ("model", "state"),
        ),
        Metric(
            "safeft_gate_refusal_ratio",
            "gauge",
            "Refused of the last answers to probes; of benign ones this is over-refusal.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_refusal_ratio_low",
            "gauge",
            "Lower end of its 95 % Wilson interval.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_refusal_ratio_high",
            "gauge",
            "Upper end of its 95 % Wilson interval.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_refusal_answers",
            "gauge",
            "How many answers the ratio is over.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_limit_ratio",
            "gauge",
            "The floor of refusals (harmful) and the ceiling of over-refusals (benign).",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_verdict_age_seconds",
            "gauge",
            "Since a round of probes last ended well; absent if none has.",
            ("model",),
        ),
        Metric(
            "safeft_gate_probe_age_seconds",
            "gauge",
            "Since a probe was last answered; absent if none was.",
            ("model",),
        ),
        Metric(
            "safeft_gate_probe_failures",
            "gauge",
            "Probes without an answer since the last one with an answer.",
            ("model",),
        ),
        Metric(
            "safeft_gate_events_total",
            "counter",
            "Changes of state and decisions of people, by what triggered them.",
            ("trigger", "state"),
        ),
        Metric(
            "safeft_probes_total",
            "counter",
            "Probes by kind and class of the answer; error: there was none.",
            ("probe", "answer"),
        ),
        Metric(
            "safeft_probe_seconds",
            "histogram",
            "How long a probe took, answered or not.",
            (),
            _SECONDS,
        ),
        Metric(
            "safeft_exporter_sources",
            "gauge",
            "Processes that pushed their numbers in the last seconds.",
        ),
    )
}


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
        self._lock = threading.Lock()
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
        for read in self._polled:
            read()
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

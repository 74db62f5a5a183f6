"""The page that Prometheus reads: what every process of the cluster has pushed, as one.

One exporter stands for all replicas and actors, because a scrape of a load-balanced port would
reach one replica at a time, and Ray's own pipeline keeps series of what is gone. Counters of a
process that ended stay in the sum (they must not fall); its gauges go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from operator import add
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client import start_http_server as serve
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.metrics import METRICS, HistogramValue, Labels, Metric, Recorder, Snapshot
from safeft.errors import InputError

log = logging.getLogger(__name__)
#: Where a serving pool's exporter is found.
NAMESPACE, EXPORTER = "safeft", "safeft-exporter"
PUSH_EVERY_S = 1.0
_SILENT_S = 10.0


class Exporter(Collector):
    """Merges pushes into Prometheus families. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sources: dict[str, tuple[float, Snapshot]] = {}
        self._here: dict[str, Recorder] = {}

    def push(self, source: str, snapshot: Snapshot) -> None:
        """Take over what a process has recorded since it began; `source` is its alone."""
        with self._lock:
            self._sources[source] = (self._clock(), snapshot)

    def include(self, source: str, recorder: Recorder) -> None:
        """Read a recorder of this very process whenever the page is asked for."""
        self._here[source] = recorder

    def collect(self) -> Iterator[Any]:
        """For prometheus_client: every metric of METRICS, also those without a series."""
        for source, recorder in self._here.items():
            self.push(source, recorder.snapshot())
        with self._lock:
            self._forget_gauges()
            numbers, histograms = self._merged()
            live = sum(bool(at) for at, _ in self._sources.values())
        numbers["safeft_exporter_sources", ()] = live
        for metric in METRICS.values():
            if metric.kind == "histogram":
                yield _histogram(metric, histograms)
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=metric.labels)
            for (name, labels), value in sorted(numbers.items()):
                if name == metric.name:
                    family.add_metric(labels, value)
            yield family

    def listen(self, host: str, port: int) -> int:
        """Serve ``/metrics`` from a thread; the port, which `port` 0 leaves to the system.

        Raises:
            InputError: the port is taken.
        """
        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, _ = serve(port, host, registry)
        except OSError as error:
            raise InputError(
                f"metrics: cannot listen on {host}:{port} ({error.strerror})"
            ) from None
        return int(server.server_port)

    def _forget_gauges(self) -> None:
        """Of silent processes; 0 stands for the time of a process that is gone."""
        now = self._clock()
        for source, (at, snapshot) in self._sources.items():
            if at and now - at > _SILENT_S:
                counters = {k: v for k, v in snapshot.numbers.items() if _counts(k[0])}
                self._sources[source] = (0.0, Snapshot(counters, snapshot.histograms))

    def _merged(
        self,
    ) -> tuple[
        dict[tuple[str, Labels], float],
        dict[tuple[str, Labels], HistogramValue],
    ]:
        numbers: dict[tuple[str, Labels], float] = {}
        histograms: dict[tuple[str, Labels], HistogramValue] = {}
        for _, snapshot in self._sources.values():
            for key, number in snapshot.numbers.items():
                both = max if METRICS[key[0]].across == "max" else add
                numbers[key] = both(numbers[key], number) if key in numbers else number
            for key, value in snapshot.histograms.items():
                known = histograms.setdefault(key, HistogramValue([0] * len(value.counts)))
                known.counts = [a + b for a, b in zip(known.counts, value.counts, strict=True)]
                known.total += value.total
        return numbers, histograms


def push_for_ever(recorder: Recorder, source: str, push: Callable[[str, Snapshot], object]) -> None:
    """Push a recorder's numbers every second from a thread that ends with the process.

    Args:
        push: takes (source, snapshot). What it raises is logged, and tried again the next second: a
            process must not end with the exporter.
    """

    def run() -> None:
        while True:
            time.sleep(PUSH_EVERY_S)
            try:
                push(source, recorder.snapshot())
            except Exception:  # logged; the next push has all of it
                log.warning("numbers could not be pushed", exc_info=True)

    threading.Thread(target=run, name="metrics-pusher", daemon=True).start()


def _counts(name: str) -> bool:
    return METRICS[name].kind == "counter"


def _histogram(
    metric: Metric, histograms: dict[tuple[str, Labels], HistogramValue]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
    for (name, labels), value in sorted(histograms.items(), key=lambda item: item[0]):
        if name == metric.name:
            below, cumulative = 0, []
            for bound, count in zip(bounds, value.counts, strict=True):
                below += count
                cumulative.append((bound, below))
            family.add_metric(labels, cumulative, value.total)
    return family

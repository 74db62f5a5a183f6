"""The measures by name, and the bar of every number they give. A new one is added here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.sqsd import cascade, exact, gpu, stage
from benchmarks.sqsd.setting import Run


@dataclass(frozen=True)
class Bar:
    """What a number must reach."""

    value: float
    at_least: bool

    def missed_by(self, number: float) -> bool:
        return number < self.value if self.at_least else number > self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


#: A measure adds its numbers, under the names that BARS has, to the run.
MEASURES: dict[str, Callable[[Run], None]] = {
    "official": exact.over_official,
    "floor": exact.over_floor,
    "oracle": exact.oracle,
    "cascade": cascade.over_official,
    "scorers": stage.scorers,
    "memory": stage.memory,
    "gpu": gpu.peak_share,
}

BARS = {
    "exact_over_official": Bar(1.8, at_least=True),
    "exact_over_floor": Bar(1.12, at_least=False),
    "cascade_over_official": Bar(6, at_least=True),
    "cascade_agreement": Bar(0.99, at_least=True),
    "oracle_max_diff": Bar(1e-4, at_least=False),
    "oracle_spearman": Bar(0.9999, at_least=True),
    "scorers_2_over_1": Bar(1.8, at_least=True),
    "memory_1m_over_10k": Bar(1.2, at_least=False),
}

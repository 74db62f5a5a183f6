"""PromQL that more than one board needs."""

from __future__ import annotations

from cluster.dashboards.part import Colour
from cluster.metrics import METRICS

#: The gate's states with their colours; `state_of` gives a state's index here.
STATES: tuple[tuple[str, Colour], ...] = (
    ("unknown", "orange"),
    ("probing", "yellow"),
    ("healthy", "green"),
    ("quarantined", "red"),
    ("restoring", "purple"),
)
#: Of a model's last good round, in seconds: from when on probes of it are no longer paced, and from
#: when on it is worth nothing, by the gate's default (`safeft up --max-age`).
AGES: tuple[tuple[float, Colour], ...] = ((8100, "orange"), (10_800, "red"))


def state_of(models: str) -> str:
    """A number for the state of each model that the label matcher `models` selects."""
    return " + ".join(
        f'{value} * max by (model) (safeft_gate_state{{state="{state}", {models}}})'
        for value, (state, _) in enumerate(STATES)
    )


def per_second(counter: str, *by: str, where: str = "") -> str:
    """The rate of a counter, summed by labels."""
    matchers = f"{{{where}}}" if where else ""
    return f"{_sum(by)}(rate({counter}{matchers}[$__rate_interval]))"


def quantile(q: float, histogram: str, where: str = "") -> str:
    """A quantile of what a histogram observed lately."""
    return f"histogram_quantile({q}, {per_second(f'{histogram}_bucket', 'le', where=where)})"


def grown(counter: str, *by: str, where: str = "", over: str = "$__range") -> str:
    """How much a counter grew, in the time range of the board unless `over` says otherwise.

    Not increase(): it takes a series' first value for its start, so that the first event of a kind
    would be missed. After a restart of the exporter the count is too small, never negative.
    """
    series = f"{counter}{{{where}}}" if where else counter
    before = f"{series} offset {over} or {series} * 0"
    growth = f"clamp_min({series} - ({before}), 0)"
    metric = METRICS.get(counter)
    if metric is not None and metric.across == "max":
        growth = f"max by ({', '.join(metric.labels)}) ({growth})"
    return f"{_sum(by)}({growth})"


def quantile_of_few(q: float, histogram: str, *by: str, where: str = "", over: str) -> str:
    """The same of what happens seldom, such as stages of jobs: its first observation counts too."""
    observed = grown(f"{histogram}_bucket", "le", *by, where=where, over=over)
    return f"histogram_quantile({q}, {observed})"


def once(gauge: str, where: str) -> str:
    """A gauge that several controllers may show, each with the same number."""
    metric = METRICS[gauge]
    return f"{metric.across} by ({', '.join(metric.labels)}) ({gauge}{{{where}}})"


def share(part: str, whole: str) -> str:
    """`part` of `whole`; nothing where `whole` is 0."""
    return f"{part} / ({whole} > 0)"


def _sum(by: tuple[str, ...]) -> str:
    return f"sum by ({', '.join(by)}) " if by else "sum"

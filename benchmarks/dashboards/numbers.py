"""Numbers and times as Grafana writes them, for the units that the dashboards use."""

from __future__ import annotations

import math
import time


def shown(value: float, unit: str) -> str:
    """A number with its unit."""
    if unit == "percentunit":
        return f"{_short(value * 100)}%"
    if unit == "s":
        return _seconds(value)
    if unit == "reqps":
        return f"{_short(value)} req/s"
    if unit.startswith("suffix:"):
        return f"{_short(value)} {unit.removeprefix('suffix:').strip()}"
    return _short(value)


def clock(at: float) -> str:
    """The time of day."""
    return time.strftime("%H:%M:%S", time.gmtime(at))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most so many."""
    if not high > low:
        high = low + 1
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for limit, name in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= limit:
            return f"{value / (1e3 if name == 'K' else limit):.3g} {name}"
    if value == round(value):
        return str(round(value))
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _seconds(value: float) -> str:
    for limit, name in ((86400, "days"), (3600, "hours"), (60, "min")):
        if abs(value) >= limit * 1.5:
            return f"{value / limit:.3g} {name}"
    if abs(value) >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms"

"""The page's pieces: tables, rates with their intervals, comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.evidence.results import ArmResult
from benchmarks.evidence.statistics import MeanRate
from safeft.evaluate import Rate
from safeft.prompts import Kind


def rate(found: Rate | MeanRate) -> str:
    return f"{100 * found.value:.1f} ({100 * found.low:.1f}–{100 * found.high:.1f})"


def spread(arm: ArmResult, kind: Kind) -> str:
    if len(arm.records) == 1:
        return ""
    low, high = arm.spread(kind)
    return f" [{100 * low:.1f}–{100 * high:.1f}]"


def difference(a: ArmResult, b: ArmResult) -> str:
    test = a.against(b)
    return f"{test.points:+.1f} points (p = {test.p:.2g})"


def names(arms: Sequence[ArmResult]) -> str:
    return ", ".join(f"`{arm.arm}`" for arm in arms)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

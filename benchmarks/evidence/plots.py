"""Frontiers: refusals against task accuracy, an arm a point, hollow where it refuses too much."""

from __future__ import annotations

import io
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.evidence.claims import HARMLESS
from benchmarks.evidence.results import BEFORE, ArmResult, Arms, Tenant

#: Okabe and Ito's colours, and markers of the families; told apart without colours too.
FAMILIES: Mapping[str, tuple[str, str]] = {
    "before": ("#000000", "*"),
    "plain": ("#000000", "o"),
    "l2": ("#56b4e9", "s"),
    "random": ("#999999", "D"),
    "asft": ("#d55e00", "^"),
    "cwac": ("#cc79a7", "v"),
    "project": ("#009e73", "P"),
    "states": ("#0072b2", "p"),
    "safe": ("#e69f00", "X"),
    "frozen": ("#f0e442", "h"),
}
_SETTINGS = {"svg.hashsalt": "safeft", "svg.fonttype": "none", "font.size": 8.0}


def _refuses_too_much(arm: ArmResult, arms: Arms) -> bool:
    before = arms.get(BEFORE)
    return before is not None and any(arm.against(before, kind).higher for kind in HARMLESS)


def frontier(tenant: Tenant, arms: Arms) -> bytes:
    """An SVG; the same arms give the same bytes."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(8.6, 4.8), layout="constrained")
        axes = figure.subplots()
        for number, (name, arm) in enumerate(arms.items(), start=1):
            colour, marker = next(v for k, v in FAMILIES.items() if name.startswith(k))
            rate, x = arm.refusal("harmful"), 100 * arm.accuracy().value
            y = 100 * rate.value
            axes.errorbar(
                x,
                y,
                yerr=[[y - 100 * rate.low], [100 * rate.high - y]],
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor="white" if _refuses_too_much(arm, arms) else colour,
                markeredgecolor="#333333",
                markeredgewidth=0.4,
                elinewidth=0.7,
                alpha=0.9,
                label=f"{number}  {name}",
            )
            # Names would cover each other where arms end near each other.
            offset = {"xytext": (4, 3), "textcoords": "offset points"}
            axes.annotate(str(number), (x, y), fontsize=6.5, **offset)
        figure.legend(loc="outside right upper", fontsize=6.0)
        axes.set_xlabel("task accuracy, %; hollow: refuses harmless prompts more than before")
        axes.set_ylabel("harmful prompts refused, % (95 % Wilson)")
        n = len(next(iter(arms.values())).bits("harmful"))
        axes.set_title(f"{tenant.title}; n = {n} prompts", fontsize=9)
        axes.grid(linewidth=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white")
    return file.getvalue()

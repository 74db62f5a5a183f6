"""The page's pictures: frontiers of arms, refusals by fifth of a ranking, tenants of the chain."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from itertools import accumulate, cycle, pairwise

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.chain_results import Chain, refusals
from benchmarks.evidence.claims import HARMLESS
from benchmarks.evidence.fifth_results import Fifths
from benchmarks.evidence.results import BEFORE, ArmResult, Arms, Tenant
from jobs.gate import MAX_DROP

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
_COLOURS = ("#000000", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
_SETTINGS = {"svg.hashsalt": "safeft", "svg.fonttype": "none", "font.size": 8.0}


def _refuses_too_much(arm: ArmResult, arms: Arms) -> bool:
    before = arms.get(BEFORE)
    return before is not None and any(arm.against(before, kind).higher for kind in HARMLESS)


def frontier(tenant: Tenant, arms: Arms) -> bytes:
    """Refusals against task accuracy, an arm a point, hollow where it refuses harmless prompts more
    often. An SVG; the same arms give the same bytes, as in all plots here."""
    return _svg((8.6, 4.8), lambda axes: draw_frontier(axes, tenant, arms), legend_size=6.0)


def by_fifth(found: Fifths) -> bytes:
    """Refusals after training on each fifth, a ranking a line; small marks are seeds."""
    return _svg((7.2, 4.0), lambda axes: draw_fifths(axes, found))


def by_tenant_of_chain(chain: Chain) -> bytes:
    """What each tenant's published model refuses with protection and without, tenants by kind and
    task."""
    return _svg((9.4, 3.6), lambda axes: draw_chain(axes, chain))


def draw_frontier(axes: Axes, tenant: Tenant, arms: Arms) -> None:
    """The points of `frontier`, numbered as in the legend."""
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
    axes.set_xlabel("task accuracy, %; hollow: refuses harmless prompts more than before")
    axes.set_ylabel("harmful prompts refused, % (95 % Wilson)")
    n = next(iter(arms.values())).refusal("harmful").n
    axes.set_title(f"{tenant.title}; n = {n} prompts", fontsize=9)


def draw_fifths(axes: Axes, found: Fifths) -> None:
    """The lines of `by_fifth`."""
    for (ranking, fifths), colour in zip(found.items(), cycle(_COLOURS)):
        rates = [arm.refusal("harmful") for arm in fifths.values()]
        y = [100 * rate.value for rate in rates]
        below = [100 * (rate.value - rate.low) for rate in rates]
        above = [100 * (rate.high - rate.value) for rate in rates]
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.errorbar(list(fifths), y, yerr=[below, above], elinewidth=0.7, label=ranking, **style)
        for n, arm in fifths.items():
            seeds = [run.numbers["refused"]["harmful"] for run in arm.records]
            marks = [100 * bits.count("1") / len(bits) for bits in seeds]
            axes.plot([n + 0.06] * len(marks), marks, "_", color=colour, markersize=5)
    axes.set_xticks(range(1, 6), ["riskiest", "2", "3", "4", "safest"])
    axes.set_xlabel("fifth of the rows that is trained on")
    axes.set_ylabel("harmful prompts refused, % (95 % Wilson)")
    axes.set_ylim(0, 100)


def draw_chain(axes: Axes, chain: Chain) -> None:
    """The points of `by_tenant_of_chain`, and what the gate compares them with."""
    groups = chain.alike()
    pairs = [pair for _, alike in groups for pair in alike]
    guarded = [(x, p.protected) for x, p in enumerate(pairs) if p.published]
    bare = [(x, p.unprotected) for x, p in enumerate(pairs) if p.unprotected]
    for points, marker, colour, label in (
        (guarded, "o", "#009e73", "published with safeft"),
        (bare, "X", "#d55e00", "published without"),
    ):
        y = [100 * refusals(record).value for _, record in points]
        axes.plot([x for x, _ in points], y, marker, color=colour, markersize=5, label=label)
    kept_out = [x for x, p in enumerate(pairs) if not p.published]
    label = "rejected or withheld by safeft"
    axes.plot(kept_out, [-5] * len(kept_out), "|", color="#333333", markersize=7, label=label)
    before = 100 * chain.before.value
    axes.axhline(before, color="#000000", linewidth=0.8, label="base model")
    floor = {"color": "#000000", "linewidth": 0.8, "linestyle": ":"}
    axes.axhline(before - 100 * MAX_DROP, label="most that the gate lets go", **floor)
    edges = list(accumulate((len(alike) for _, alike in groups), initial=0))
    for edge in edges[1:-1]:
        axes.axvline(edge - 0.5, color="#bbbbbb", linewidth=0.6)
    middles = [(low + high - 1) / 2 for low, high in pairwise(edges)]
    named = [f"{kind}\n{task}\n({len(alike)})" for (kind, task), alike in groups]
    axes.set_xticks(middles, named, fontsize=7.0)
    axes.set_ylabel("harmful prompts refused, %")
    axes.set_ylim(-10, 100)


def _svg(
    inches: tuple[float, float], draw: Callable[[Axes], None], *, legend_size: float = 7.0
) -> bytes:
    with rc_context(_SETTINGS):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        figure.legend(loc="outside right upper", fontsize=legend_size)
        axes.grid(linewidth=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white")
    return file.getvalue()

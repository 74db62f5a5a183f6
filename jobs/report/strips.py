"""The figure of all row scores: calibration classes and tenants against the threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from jobs.report.model import ProfileSummary, TenantReport
from jobs.report.svg import COLOURS, WIDTH, draw, fixed_axes, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW = 0.46  # inches


@dataclass(frozen=True)
class Strip:
    """Some rows' scores. ``colour`` is one of `svg.COLOURS`, ``marker`` one of matplotlib's."""

    label: str
    scores: Sequence[float]
    colour: str
    marker: str


def score_strips(profile: ProfileSummary, tenants: Sequence[TenantReport]) -> Markup:
    """Every row's SQSD as a mark: the calibration classes, then the tenants, and the threshold."""
    strips = calibration_strips(profile.calibration)
    for tenant in tenants:
        strips += _tenant_strips(tenant)
    return draw_strips(strips, profile.policy.row_threshold)


def calibration_strips(scores_by_class: Mapping[str, Sequence[float]]) -> list[Strip]:
    """One strip a class of reference rows."""
    return [
        Strip(
            f"calibration: {name} (n = {len(scores)})",
            scores,
            "orange" if "danger" in name else "sky",
            "D" if "danger" in name else "o",
        )
        for name, scores in scores_by_class.items()
    ]


def draw_strips(strips: Sequence[Strip], threshold: float) -> Markup:
    """Scores as marks, a strip above the other, and the threshold."""
    everything = [score for strip in strips for score in strip.scores] + [threshold]
    low, high = min(everything), max(everything)
    margin = 0.04 * (high - low or 1.0)

    def paint(figure: Figure) -> None:
        axes = fixed_axes(figure, left=0.15, bottom=0.48, top=0.3)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(len(strips) - 0.25, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.axvspan(threshold, high + margin, color=COLOURS["vermillion"], alpha=0.07, linewidth=0)
        axes.vlines(  # broken where a label stands
            [threshold] * len(strips),
            [y - 0.18 for y in range(len(strips))],
            [y + 0.38 for y in range(len(strips))],
            color=COLOURS["vermillion"],
            linewidth=1.3,
        )
        axes.annotate(
            f"threshold {threshold:.2f}",
            (threshold, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=_towards_middle(threshold, low, high),
            color=COLOURS["vermillion"],
        )
        for y, strip in enumerate(strips):
            axes.axhline(y + 0.38, color=COLOURS["line"], linewidth=0.6)
            axes.text(low - margin, y - 0.38, strip.label, va="center")
            points = _spread(strip.scores, low, high)
            axes.plot(
                [x for x, _ in points],
                [y + 0.1 + dy for _, dy in points],
                strip.marker,
                color=COLOURS[strip.colour],
                markersize=4.6 if strip.marker == "^" else 3.4,
                alpha=0.75,
                markeredgewidth=0,
            )
        axes.set_xlabel("SQSD: higher pushes the model towards danger")

    height = 0.8 + _ROW * len(strips)
    told = "; ".join(_range_in_words(strip) for strip in strips)
    return draw(
        "scores",
        f"SQSD by class. Threshold {threshold:.2f}. {told}.",
        WIDTH,
        height,
        paint,
    )


def _tenant_strips(tenant: TenantReport) -> list[Strip]:
    planted = set(tenant.planted or ())
    parts = [("", False, "blue", "o")]
    if planted:
        parts = [(", other rows", False, "blue", "o"), (", planted rows", True, "vermillion", "^")]
    strips = []
    for suffix, wanted, colour, marker in parts:
        rows = [row for row in tenant.scores if (row.line in planted) == wanted]
        scores = [row.score for row in rows if row.score is not None]
        unscored = f", {len(rows) - len(scores)} without a score" if len(rows) > len(scores) else ""
        label = f"{one_line(tenant.name, 30)}{suffix} (n = {len(rows)}{unscored})"
        strips.append(Strip(label, scores, colour, marker))
    return strips


def _spread(scores: Sequence[float], low: float, high: float) -> list[tuple[float, float]]:
    """Marks at ``(score, offset)``: offsets are spread evenly, and a mark on another is left out.

    At most 160 x 7 marks remain, whatever the size of the dataset.
    """
    cells: dict[tuple[int, int], tuple[float, float]] = {}
    for index, score in enumerate(sorted(scores)):
        level = int((index * 0.6180339887498949) % 1 * 7)  # the golden ratio fills gaps evenly
        column = int(160 * (score - low) / (high - low or 1.0))
        cells.setdefault((column, level), (score, (level - 3) * 0.06))
    return list(cells.values())


def _range_in_words(strip: Strip) -> str:
    if not strip.scores:
        return f"{strip.label}: no scores"
    return f"{strip.label}: {min(strip.scores):.2f} to {max(strip.scores):.2f}"


def _towards_middle(x: float, low: float, high: float) -> str:
    share = (x - low) / (high - low or 1.0)
    return "left" if share < 0.25 else "right" if share > 0.75 else "center"

"""The figures. Each is narrow enough to be read on a phone; the page sets them side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from jobs.report.facts import Measured, in_words, percent
from jobs.report.model import ArmReport
from jobs.report.svg import COLOURS, WIDTH, draw, fixed_axes, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEAN_OF = 5  # steps in the moving mean of a loss curve
_NARROW = 3.4  # where three stand side by side
_STYLES = (
    ("blue", "o", "-"),
    ("green", "s", "--"),
    ("vermillion", "^", "-."),
    ("purple", "D", ":"),
    ("orange", "v", "-"),
    ("sky", "P", "--"),
)
HUES = tuple(colour for colour, _, _ in _STYLES)
"""Colours of the arms, in their order, by their name in `COLOURS`."""


def refusal_panel(kind: str, measured: Sequence[Measured]) -> Markup:
    """Refusal rates on one prompt set, before and after, with their intervals."""
    labels = [_wrapped(m.name) for m in measured]
    lines = sum(label.count("\n") for label in labels)
    rates = [m.refusal(kind) for m in measured]

    def paint(figure: Figure) -> None:
        axes = fixed_axes(figure, left=0.12, bottom=0.28, top=0.04, right=1.38)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.axvspan(rates[0].low, rates[0].high, color=COLOURS["muted"], alpha=0.13, linewidth=0)
        y = 0.0
        for index, (label, rate) in enumerate(zip(labels, rates, strict=True)):
            extra = 0.38 * label.count("\n")
            axes.text(0, y + 0.32 + extra / 2, label, va="center", linespacing=1.1)
            y += 0.72 + extra
            colour, marker, _ = _style(index)
            axes.errorbar(
                [rate.value],
                [y],
                xerr=[[rate.value - rate.low], [rate.high - rate.value]],
                fmt=marker,
                color=COLOURS[colour],
                markersize=6,
                capsize=3,
                elinewidth=1.6,
            )
            axes.annotate(
                f"{percent(rate)} ({100 * rate.low:.0f}–{100 * rate.high:.0f})",
                (1, y),
                (10, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                annotation_clip=False,
            )
            y += 0.36
        axes.set_ylim(y, 0)

    told = "; ".join(f"{m.name}: {in_words(r)}" for m, r in zip(measured, rates, strict=True))
    height = 0.35 + 0.44 * len(measured) + 0.16 * lines
    return draw(f"refusals-{kind}", f"Refused {kind} prompts. {told}.", _NARROW, height, paint)


def loss_curves(arms: Sequence[ArmReport]) -> Markup:
    """The training loss of every arm: each step thin, a moving mean thick."""

    def paint(figure: Figure) -> None:
        axes = _curve_axes(figure, len(arms), "loss")
        for index, arm in enumerate(arms):
            colour, _, dashes = _style(index + 1)
            steps = [point.step for point in arm.curve]
            losses = [point.loss for point in arm.curve]
            axes.plot(steps, losses, color=COLOURS[colour], linewidth=0.8, alpha=0.35)
            axes.plot(
                steps,
                [
                    sum(window := losses[max(0, i + 1 - MEAN_OF) : i + 1]) / len(window)
                    for i in range(len(losses))
                ],
                color=COLOURS[colour],
                linewidth=1.8,
                linestyle=dashes,
                label=one_line(arm.name),
            )
        _legend(axes)

    told = "; ".join(
        f"{a.name}: from {a.curve[0].loss:.2f} to {a.curve[-1].loss:.2f}" for a in arms if a.curve
    )
    return draw("loss", f"Training loss by step. {told}.", WIDTH, 2.6 + 0.2 * len(arms), paint)


def penalty_curves(arms: Sequence[ArmReport]) -> Markup | None:
    """What constraints added to the loss; None if no arm has a penalty."""
    curves = [
        (index, arm, [(p.step, p.penalty) for p in arm.curve if p.penalty is not None])
        for index, arm in enumerate(arms)
    ]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return None

    def paint(figure: Figure) -> None:
        axes = _curve_axes(figure, len(curves), "penalty")
        for index, arm, points in curves:
            colour, _, dashes = _style(index + 1)
            axes.plot(
                [step for step, _ in points],
                [penalty for _, penalty in points],
                color=COLOURS[colour],
                linewidth=1.8,
                linestyle=dashes,
                label=one_line(arm.name),
            )
        axes.set_ylim(bottom=0)
        _legend(axes)

    told = "; ".join(f"{arm.name}: ends at {points[-1][1]:.3g}" for _, arm, points in curves)
    height = 2.6 + 0.2 * len(curves)
    return draw("penalty", f"Constraint penalty by step. {told}.", WIDTH, height, paint)


def _curve_axes(figure: Figure, legend_rows: int, label: str) -> Axes:
    axes = fixed_axes(figure, left=0.55, bottom=0.45 + 0.2 * legend_rows, top=0.08)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(axis="y", linewidth=0.6)
    axes.locator_params(axis="x", integer=True)
    return axes


def _legend(axes: Axes) -> None:
    figure: Any = axes.get_figure()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0), bbox_transform=figure.transFigure)


def _style(index: int) -> tuple[str, str, str]:
    """Colour, marker and dashes; 0 is the model before training."""
    return ("ink", "o", "-") if index == 0 else _STYLES[(index - 1) % len(_STYLES)]


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 40, max_lines=2, placeholder=" …"))

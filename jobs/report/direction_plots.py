"""The figures of a safety profile: how its directions were made, whether they steer, and which
state was chosen to read rows at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from jobs.report.svg import COLOURS, WIDTH, draw, fixed_axes
from safeft.reference_state import ReferenceState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"safety-direction": "safety direction", "danger-direction": "danger direction"}


def training_loss(part: str, losses: Sequence[float]) -> Markup:
    """The loss of each step of one training."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure)
        axes.plot(range(1, len(losses) + 1), losses, color=COLOURS["blue"], linewidth=1.4)
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)

    told = f"Training loss: from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps."
    return draw(f"loss-{part}", told, WIDTH, 2.2, paint)


def steering(part: str, found: Mapping[str, Any]) -> Markup:
    """The safety score along a direction: mean on harmful and benign prompts, harmful ones thin."""
    magnitudes = found["magnitudes"]
    means = {kind: [fmean(scores) for scores in found[kind]] for kind in ("harmful", "benign")}

    def paint(figure: Figure) -> None:
        axes = _axes(figure, legend=True)
        for scores in zip(*found["harmful"], strict=True):
            axes.plot(magnitudes, scores, color=COLOURS["vermillion"], linewidth=0.7, alpha=0.25)
        for kind, colour, style in (
            ("harmful", "vermillion", "o-"),
            ("benign", "green", "s--"),
        ):
            label = f"{kind} prompts (n = {len(found[kind][0])})"
            axes.plot(magnitudes, means[kind], style, color=COLOURS[colour], label=label)
        axes.set(xlabel=f"multiple of the {NAMES[part]}", ylabel="safety score, nats a token")
        axes.set_xticks(magnitudes, [f"{m:+g}" if m else "0" for m in magnitudes])
        _legend(axes)

    told = "; ".join(
        f"{kind} prompts: "
        + ", ".join(
            f"{mean:.2f} at {by:+g}" for by, mean in zip(magnitudes, means[kind], strict=True)
        )
        for kind in means
    )
    return draw(
        f"steering-{part}", f"Safety score along the {NAMES[part]}. {told}.", WIDTH, 2.9, paint
    )


def drift(choice: Mapping[str, Any]) -> Markup:
    """Drift along the danger direction: steps of benign tuning, and the scaled safety states."""
    tuned = [c for c in choice["candidates"] if c["state"]["trajectory"] == "benign"]
    scaled = [c for c in choice["candidates"] if c["state"]["trajectory"] == "safety"]
    steps = [0, *(c["state"]["at"] for c in tuned)]
    grown = [0.0, *(c["drift"] for c in tuned)]

    def paint(figure: Figure) -> None:
        axes = _axes(figure, legend=True)
        axes.axhline(0, color=COLOURS["line"], linewidth=1)
        axes.plot(steps, grown, "o-", color=COLOURS["blue"], label="benign tuning, by step")
        for index, candidate in enumerate(scaled):
            axes.axhline(
                candidate["drift"],
                color=COLOURS["purple"],
                linewidth=1,
                linestyle=":",
                label="safety states" if index == 0 else None,
            )
        for candidate in tuned:
            if candidate["eligible"]:
                axes.plot(
                    [candidate["state"]["at"]],
                    [candidate["drift"]],
                    "o",
                    markersize=9,
                    markerfacecolor="none",
                    color=COLOURS["blue"],
                )
        axes.set(xlabel="step of benign tuning", ylabel="drift along danger")
        _legend(axes)

    told = "; ".join(f"{state_name(c['state'])}: {c['drift']:.3g}" for c in choice["candidates"])
    return draw("drift", f"Drift along the danger direction. {told}.", WIDTH, 2.9, paint)


def separation(choice: Mapping[str, Any]) -> Markup:
    """The AUC of every pair of classes at every state; the chosen state in bold."""
    candidates = choice["candidates"]
    pairs = list(candidates[0]["pairs"])
    styles = (("sky", "o"), ("orange", "^"), ("purple", "D"), ("green", "s"))

    def paint(figure: Figure) -> None:
        axes = fixed_axes(figure, left=2.0, bottom=0.45 + 0.2 * len(pairs), top=0.06)
        for index, pair in enumerate(pairs):
            colour, marker = styles[index % len(styles)]
            axes.plot(
                [c["pairs"][pair] for c in candidates],
                range(len(candidates)),
                marker,
                color=COLOURS[colour],
                markersize=5,
                label=pair,
            )
        labels = [
            state_name(c["state"]) + ("" if c["eligible"] else " (too early)") for c in candidates
        ]
        axes.set_yticks(range(len(candidates)), labels)
        for label, candidate in zip(axes.get_yticklabels(), candidates, strict=True):
            if candidate["state"] == choice["chosen"]:
                label.set_fontweight("bold")
                label.set_color(COLOURS["ink"])
        axes.set_ylim(len(candidates) - 0.5, -0.5)
        axes.set_xlabel("AUC, dangerous against benign rows")
        axes.grid(axis="x", linewidth=0.6)
        _legend(axes)

    told = "; ".join(f"{state_name(c['state'])}: worst pair {c['auc']:.2f}" for c in candidates)
    height = 0.6 + 0.27 * len(candidates) + 0.2 * len(pairs)
    return draw("separation", f"AUC at each state. {told}.", WIDTH, height, paint)


def state_name(state: Mapping[str, Any]) -> str:
    """A reference state in words."""
    return str(ReferenceState(**state))


def _axes(figure: Figure, *, legend: bool = False) -> Axes:
    axes = fixed_axes(figure, left=0.6, bottom=0.85 if legend else 0.45, top=0.08)
    axes.grid(axis="y", linewidth=0.6)
    return axes


def _legend(axes: Axes) -> None:
    figure: Any = axes.get_figure()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0), bbox_transform=figure.transFigure)

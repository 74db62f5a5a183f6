"""Charts as SVG text: lines, stacks, bars over time, cells. Written for these dashboards only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from benchmarks.dashboards.numbers import clock, shown, ticks
from tests.grafana import Window

COLOURS = {
    "green": "#73bf69",
    "yellow": "#fade2a",
    "orange": "#ff9830",
    "red": "#f2495c",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "text": "#ccccdc",
}
PALETTE = ["green", "yellow", "blue", "orange", "red", "purple"]
_MORE = ["#8ab8ff", "#ffb357", "#96d98d", "#ca95e5", "#ff7383", "#ffee52", "#37872d", "#c4162a"]
_GRID, _FAINT = "#2c2f36", "#8e8e98"


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A change of the gate."""

    at: float
    colour: str


@dataclass
class Plot:
    """The place between the axes of a chart."""

    width: float
    height: float
    window: Window
    low: float = 0.0
    high: float = 1.0
    left: float = 62.0
    bottom: float = 20.0
    parts: list[str] = field(default_factory=list)

    def x(self, at: float) -> float:
        """Of a moment."""
        share = (at - self.window.start) / (self.window.end - self.window.start)
        return self.left + share * (self.width - self.left - 8)

    def y(self, value: float) -> float:
        """Of a number."""
        share = (value - self.low) / (self.high - self.low)
        return 6 + (1 - share) * (self.height - self.bottom - 6)

    def axes(self, unit: str, *, numbers: bool = True) -> None:
        """Grid and labels, for which the widest one makes room."""
        values = ticks(self.low, self.high, max(2, int(self.height / 40))) if numbers else []
        labels = [shown(value, unit) for value in values]
        self.left = max([self.left, *(12 + 6.5 * len(label) for label in labels)])
        span = self.window.end - self.window.start
        every = next(s for s in (10, 15, 30, 60, 120, 300, 600, 1800, 3600) if span / s <= 7)
        at = (self.window.start // every + 1) * every
        while at <= self.window.end:
            if self.left + 25 < self.x(at) < self.width - 24:
                self.line(self.x(at), 6, self.x(at), self.height - self.bottom, _GRID)
                self.text(self.x(at), self.height - 5, clock(at), "middle", _FAINT)
            at += every
        for value, label in zip(values, labels, strict=True):
            self.line(self.left, self.y(value), self.width - 8, self.y(value), _GRID)
            self.text(self.left - 6, self.y(value) + 4, label, "end", _FAINT)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> None:
        """A straight line."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"'
            f"{dashes}/>"
        )

    def text(self, x: float, y: float, text: str, anchor: str, colour: str) -> None:
        """A text."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
            f"{escape(text)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, **more: str
    ) -> None:
        """A filled rectangle."""
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" '
            f'height="{max(0.5, height):.1f}" fill="{colour}"{extra}/>'
        )

    def marks(self, marks: Iterable[Mark]) -> None:
        """A dashed line for each change, with a foot."""
        for mark in marks:
            if self.window.start <= mark.at <= self.window.end:
                x, foot = self.x(mark.at), self.height - self.bottom
                self.line(x, 6, x, foot, mark.colour, "2 3")
                self.parts.append(
                    f'<path d="M{x - 4:.1f},{foot + 6:.1f} l4,-6 l4,6 z" fill="{mark.colour}"/>'
                )

    def svg(self) -> str:
        """The picture."""
        inside = "".join(self.parts)
        return f'<svg width="{self.width:.0f}" height="{self.height:.0f}">{inside}</svg>'


def colour_of(number: int) -> str:
    """Of the line with that number."""
    every = [COLOURS[name] for name in PALETTE] + _MORE
    return every[number % len(every)]


def chart(
    plot: Plot,
    lines: Sequence[Line],
    unit: str,
    *,
    low: float | None,
    high: float | None,
    stacked: bool,
    limits: Sequence[tuple[float, str]] = (),
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over time, or areas on top of one another."""
    shapes = _stack(lines) if stacked else [(line, line.points, None) for line in lines]
    values = [v for _, points, _ in shapes for _, v in points]
    plot.low = min(values, default=0.0) if low is None else low
    plot.high = max([*values, plot.low]) if high is None else high
    if plot.high <= plot.low:
        plot.high = plot.low + 1
    elif high is None:
        plot.high += 0.05 * (plot.high - plot.low)
    plot.axes(unit)
    for value, colour in limits:
        if plot.low <= value <= plot.high:
            plot.line(plot.left, plot.y(value), plot.width - 8, plot.y(value), colour, "8 4")
    plot.marks(marks)
    gap = 3 * plot.window.step + 1
    for line, points, floor in reversed(shapes):
        for part in _unbroken(points, gap):
            path = " ".join(f"{plot.x(at):.1f},{plot.y(v):.1f}" for at, v in part)
            if floor is not None:
                below = " ".join(
                    f"{plot.x(at):.1f},{plot.y(floor.get(at, plot.low)):.1f}"
                    for at, _ in reversed(part)
                )
                plot.parts.append(
                    f'<polygon points="{path} {below}" fill="{line.colour}" fill-opacity="0.4"/>'
                )
            style = ' stroke-dasharray="6 4" stroke-width="1"' if line.dashed else ""
            if len(part) == 1:
                at, value = part[0]
                plot.parts.append(
                    f'<circle cx="{plot.x(at):.1f}" cy="{plot.y(value):.1f}" r="2.5" '
                    f'fill="{line.colour}"/>'
                )
            plot.parts.append(
                f'<polyline points="{path}" fill="none" stroke="{line.colour}" '
                f'stroke-width="{1 if stacked else 1.8}"{style}/>'
            )
    return plot.svg()


def timeline(
    plot: Plot,
    rows: Sequence[tuple[str, list[tuple[float, float]]]],
    texts: dict[str, tuple[str, str]],
    marks: Sequence[Mark] = (),
) -> str:
    """A bar over time for each row, in text and colour of its value."""
    plot.left = 14 + 7 * max((len(name) for name, _ in rows), default=4)
    plot.axes("none", numbers=False)
    height = (plot.height - plot.bottom - 6) / max(1, len(rows))
    for number, (name, points) in enumerate(rows):
        top = 6 + number * height + 0.05 * height
        plot.text(plot.left - 8, top + 0.45 * height + 4, name, "end", COLOURS["text"])
        for start, end, value in _runs(points, plot.window.step):
            text, colour = texts[str(round(value))]
            x, width = plot.x(start), plot.x(min(end, plot.window.end)) - plot.x(start)
            plot.box(x, top, width, 0.9 * height, COLOURS[colour], fill_opacity="0.8")
            if width > 8 * len(text):
                plot.text(x + 5, top + 0.45 * height + 4, text, "start", "#111217")
    plot.marks(marks)
    return plot.svg()


def cells(plot: Plot, columns: dict[float, dict[str, float]], bounds: list[str], unit: str) -> str:
    """How many observations fell between two bounds, by time."""
    plot.axes(unit, numbers=False)
    height = (plot.height - plot.bottom - 6) / max(1, len(bounds))
    most = max((n for column in columns.values() for n in column.values()), default=1.0) or 1.0
    every = max(1, round(18 / height))
    for number, bound in enumerate(bounds):
        top = plot.height - plot.bottom - (number + 1) * height
        if number % every == 0:
            text = bound if bound == "+Inf" else shown(float(bound), unit)
            plot.text(plot.left - 6, top + height / 2 + 4, text, "end", _FAINT)
        for at, column in columns.items():
            if count := column.get(bound, 0.0):
                x = plot.x(at - plot.window.step)
                wide = plot.x(at) - x
                opacity = f"{0.25 + 0.75 * (count / most) ** 0.5:.2f}"
                plot.box(x, top, wide, height - 1, COLOURS["blue"], fill_opacity=opacity)
    return plot.svg()


def _stack(
    lines: Sequence[Line],
) -> list[tuple[Line, list[tuple[float, float]], dict[float, float]]]:
    floor: dict[float, float] = {}
    shapes = []
    for line in lines:
        top = [(at, floor.get(at, 0.0) + value) for at, value in line.points]
        shapes.append((line, top, dict(floor)))
        floor.update(top)
    return shapes


def _unbroken(points: list[tuple[float, float]], gap: float) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = []
    for point in points:
        if parts and point[0] - parts[-1][-1][0] <= gap:
            parts[-1].append(point)
        else:
            parts.append([point])
    return parts


def _runs(points: list[tuple[float, float]], step: float) -> list[tuple[float, float, float]]:
    """(start, end, value) of equal values in a row."""
    runs: list[tuple[float, float, float]] = []
    for at, value in points:
        if runs and runs[-1][2] == value and at - runs[-1][1] <= 2 * step:
            runs[-1] = (runs[-1][0], at + step, value)
        else:
            runs.append((at, at + step, value))
    return runs

"""Panels by what they show: one number, lines, states, buckets, bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster.dashboards.grafana import (
    DataLink,
    FieldColour,
    FieldConfig,
    FieldDefaults,
    GridPos,
    MappedText,
    Matcher,
    Override,
    Panel,
    Property,
    Target,
    Threshold,
    Thresholds,
    ValueMapping,
)
from cluster.dashboards.options import (
    BarGaugeOptions,
    GraphStyle,
    HeatmapAxis,
    HeatmapOptions,
    HeatmapStyle,
    Legend,
    LineStyle,
    Stacking,
    StateTimelineOptions,
    StatOptions,
    ThresholdsStyle,
    TimelineStyle,
    TimeSeriesOptions,
)
from cluster.dashboards.part import Colour, Unit

_T = TypeVar("_T")
Steps = Sequence[tuple[float, Colour]]
Texts = Sequence[tuple[str, Colour]]


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of what it gives.

    Attributes:
        legend: with {{label}} filled in.
        colour: of its lines; None: one for each line.
        dashed: for limits and ends of intervals.
    buckets: it is a histogram by (le): what is between two bounds is shown, not what is below one.
    """

    expr: str
    legend: str
    colour: Colour | None = None
    dashed: bool = False
    buckets: bool = False


def thresholds(steps: Steps, lowest: Colour = "green") -> Thresholds:
    """`lowest` below the first step; each step's colour from its value upwards."""
    values = [value for value, _ in steps]
    if values != sorted(set(values)):
        raise ValueError(f"thresholds must rise: {values}")
    first = Threshold(color=lowest, value=None)
    return Thresholds(steps=(first, *(Threshold(color=c, value=v) for v, c in steps)))


def stat(
    title: str,
    expr: str,
    description: str,
    *,
    width: int = 4,
    unit: Unit = "none",
    steps: Steps = (),
    lowest: Colour = "green",
    links: Sequence[DataLink] = (),
) -> Panel:
    """One number, its background coloured by `steps`; a neutral number without any."""
    defaults = FieldDefaults(
        unit=unit,
        no_value="none",
        color=FieldColour(mode="thresholds"),
        thresholds=thresholds(steps, lowest if steps else "text"),
        links=tuple(links),
    )
    return Panel(
        grid_pos=GridPos(w=width),
        type="stat",
        title=title,
        description=description,
        field_config=FieldConfig(defaults=defaults),
        options=StatOptions(color_mode="background" if steps else "none"),
        targets=(Target(ref_id="A", expr=expr, instant=True, range=False),),
    )


def lines(
    title: str,
    queries: Sequence[Query],
    description: str,
    *,
    width: int = 12,
    unit: Unit = "short",
    steps: Steps = (),
    lowest: Colour = "green",
    low: float | None = 0,
    high: float | None = None,
    stacked: bool = False,
    links: Sequence[DataLink] = (),
) -> Panel:
    """Lines over time; `steps` are drawn as dashed lines."""
    style = GraphStyle(
        fill_opacity=40 if stacked else 0,
        line_width=1 if stacked else 2,
        stacking=Stacking(mode="normal" if stacked else "none"),
        thresholds_style=ThresholdsStyle(mode="dashed" if steps else "off"),
    )
    defaults = FieldDefaults(
        unit=unit,
        min=low,
        max=high,
        color=FieldColour(mode="palette-classic"),
        thresholds=thresholds(steps, lowest),
        links=tuple(links),
        custom=style,
    )
    return Panel(
        grid_pos=GridPos(w=width),
        type="timeseries",
        title=title,
        description=description,
        field_config=FieldConfig(defaults=defaults, overrides=tuple(_looks(queries))),
        options=TimeSeriesOptions(legend=Legend(calcs=("lastNotNull",))),
        targets=tuple(
            Target(ref_id=ref, expr=query.expr, legend_format=query.legend)
            for ref, query in lettered(queries)
        ),
    )


def states(title: str, query: Query, texts: Texts, description: str, *, width: int = 16) -> Panel:
    """A bar over time for each series, in the text and colour of its value: 0, 1, ..."""
    defaults = FieldDefaults(
        unit="none",
        color=FieldColour(mode="thresholds"),
        thresholds=thresholds((), "text"),
        mappings=(mapped(texts),),
        custom=TimelineStyle(),
    )
    return Panel(
        grid_pos=GridPos(w=width),
        type="state-timeline",
        title=title,
        description=description,
        field_config=FieldConfig(defaults=defaults),
        options=StateTimelineOptions(),
        targets=(Target(ref_id="A", expr=query.expr, legend_format=query.legend),),
    )


def buckets(title: str, expr: str, description: str, *, width: int = 12, unit: Unit) -> Panel:
    """How a histogram's observations moved over time; `expr` is by (le)."""
    defaults = FieldDefaults(
        color=FieldColour(mode="thresholds"),
        thresholds=thresholds((), "text"),
        custom=HeatmapStyle(),
    )
    return Panel(
        grid_pos=GridPos(w=width),
        type="heatmap",
        title=title,
        description=description,
        field_config=FieldConfig(defaults=defaults),
        options=HeatmapOptions(y_axis=HeatmapAxis(unit=unit)),
        targets=(Target(ref_id="A", expr=expr, legend_format="{{le}}", format="heatmap"),),
    )


def bars(
    title: str,
    query: Query,
    description: str,
    *,
    width: int = 12,
    unit: Unit = "none",
    steps: Steps = (),
    lowest: Colour = "blue",
    links: Sequence[DataLink] = (),
) -> Panel:
    """A bar for each series, as of now."""
    defaults = FieldDefaults(
        unit=unit,
        min=0,
        no_value="none",
        color=FieldColour(mode="thresholds"),
        thresholds=thresholds(steps, lowest),
        links=tuple(links),
    )
    return Panel(
        grid_pos=GridPos(w=width),
        type="bargauge",
        title=title,
        description=description,
        field_config=FieldConfig(defaults=defaults),
        options=BarGaugeOptions(),
        targets=(
            Target(
                ref_id="A",
                expr=query.expr,
                legend_format=query.legend,
                format="heatmap" if query.buckets else "time_series",
                instant=True,
                range=False,
            ),
        ),
    )


def lettered(things: Sequence[_T]) -> list[tuple[str, _T]]:
    """With the letters that Grafana gives a panel's queries."""
    return [(chr(ord("A") + number), thing) for number, thing in enumerate(things)]


def _looks(queries: Sequence[Query]) -> list[Override]:
    overrides = []
    for ref, query in lettered(queries):
        properties = []
        if query.colour is not None:
            fixed = FieldColour(mode="fixed", fixed_color=query.colour)
            properties.append(Property(id="color", value=fixed.model_dump(by_alias=True)))
        if query.dashed:
            dash = LineStyle(fill="dash", dash=(6, 4))
            properties.append(Property(id="custom.lineStyle", value=dash.model_dump()))
            properties.append(Property(id="custom.lineWidth", value=1))
        if properties:
            matcher = Matcher(id="byFrameRefID", options=ref)
            overrides.append(Override(matcher=matcher, properties=tuple(properties)))
    return overrides


def mapped(texts: Texts) -> ValueMapping:
    """Text and colour of the values 0, 1, ..."""
    return ValueMapping(
        options={
            str(value): MappedText(text=text, color=colour, index=value)
            for value, (text, colour) in enumerate(texts)
        }
    )

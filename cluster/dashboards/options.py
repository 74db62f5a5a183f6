"""What each kind of panel is told about its looks, as types; see grafana.py."""

from __future__ import annotations

from typing import Literal

from cluster.dashboards.part import Colour, Part


class Reduce(Part):
    """Which value of a series is shown: the last one."""

    calcs: tuple[Literal["lastNotNull"], ...] = ("lastNotNull",)
    fields: str = ""
    values: bool = False


class Legend(Part):
    show_legend: bool = True
    display_mode: Literal["list", "table"] = "list"
    placement: Literal["bottom", "right"] = "bottom"
    calcs: tuple[Literal["lastNotNull", "max", "mean"], ...] = ()


class Tooltip(Part):
    mode: Literal["single", "multi", "none"] = "multi"
    sort: Literal["asc", "desc", "none"] = "desc"


class StatOptions(Part):
    """One big number, coloured by its thresholds."""

    reduce_options: Reduce = Reduce()
    orientation: Literal["auto"] = "auto"
    color_mode: Literal["background", "value", "none"] = "background"
    graph_mode: Literal["area", "none"] = "none"
    justify_mode: Literal["auto"] = "auto"
    text_mode: Literal["auto", "value"] = "auto"
    wide_layout: bool = True
    show_percent_change: bool = False
    percent_change_color_mode: Literal["standard"] = "standard"


class TimeSeriesOptions(Part):
    legend: Legend = Legend()
    tooltip: Tooltip = Tooltip()


class TableOptions(Part):
    show_header: bool = True
    cell_height: Literal["sm"] = "sm"
    frame_index: int = 0


class StateTimelineOptions(Part):
    show_value: Literal["auto", "always", "never"] = "auto"
    row_height: float = 0.9
    merge_values: bool = True
    align_value: Literal["left"] = "left"
    legend: Legend = Legend()
    tooltip: Tooltip = Tooltip(mode="single", sort="none")


class HeatmapColour(Part):
    mode: Literal["scheme"] = "scheme"
    scheme: Literal["Blues"] = "Blues"
    fill: Colour = "blue"
    scale: Literal["exponential"] = "exponential"
    exponent: float = 0.5
    steps: int = 64
    reverse: bool = False


class HeatmapAxis(Part):
    unit: str
    axis_placement: Literal["left"] = "left"


class HeatmapTooltip(Part):
    mode: Literal["single"] = "single"
    y_histogram: bool = True
    show_color_scale: bool = False


class HeatmapLegend(Part):
    show: bool = True


class Exemplars(Part):
    color: Colour = "orange"


class HeatmapOptions(Part):
    """Buckets of a Prometheus histogram over time: no calculation is left to Grafana."""

    calculate: bool = False
    cell_gap: int = 1
    color: HeatmapColour = HeatmapColour()
    exemplars: Exemplars = Exemplars()
    legend: HeatmapLegend = HeatmapLegend()
    show_value: Literal["never"] = "never"
    tooltip: HeatmapTooltip = HeatmapTooltip()
    y_axis: HeatmapAxis


class BarGaugeOptions(Part):
    """A bar a series, longest value full."""

    reduce_options: Reduce = Reduce()
    orientation: Literal["horizontal"] = "horizontal"
    display_mode: Literal["basic"] = "basic"
    value_mode: Literal["text"] = "text"
    name_placement: Literal["left"] = "left"
    show_unfilled: bool = True
    sizing: Literal["auto"] = "auto"
    min_viz_width: int = 8
    min_viz_height: int = 16
    max_viz_height: int = 300
    legend: Legend = Legend(show_legend=False)


PanelOptions = (
    StatOptions
    | TimeSeriesOptions
    | TableOptions
    | StateTimelineOptions
    | HeatmapOptions
    | BarGaugeOptions
)


class ThresholdsStyle(Part):
    mode: Literal["off", "line", "dashed", "area"] = "off"


class Stacking(Part):
    mode: Literal["none", "normal"] = "none"
    group: str = "A"


class LineStyle(Part):
    fill: Literal["solid", "dash"]
    dash: tuple[int, int] | None = None


class GraphStyle(Part):
    """How the lines of a time series are drawn."""

    draw_style: Literal["line", "bars", "points"] = "line"
    line_interpolation: Literal["linear", "stepAfter"] = "linear"
    line_width: int = 2
    fill_opacity: int = 0
    show_points: Literal["auto", "never"] = "never"
    span_nulls: bool = False
    stacking: Stacking = Stacking()
    thresholds_style: ThresholdsStyle = ThresholdsStyle()


class CellOptions(Part):
    type: Literal["auto", "color-text", "color-background"]


class TableStyle(Part):
    align: Literal["auto"] = "auto"
    cell_options: CellOptions = CellOptions(type="auto")
    inspect: bool = False


class TimelineStyle(Part):
    fill_opacity: int = 80
    line_width: int = 0


class HeatmapStyle(Part):
    pass


CustomStyle = GraphStyle | TableStyle | TimelineStyle | HeatmapStyle

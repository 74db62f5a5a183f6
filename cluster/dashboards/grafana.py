"""The part of Grafana's dashboard model that the dashboards use, as types.

Field names (camelCase in the JSON), enums and defaults are those of Grafana's documented dashboard
schema, version 39: Grafana 10.4 and later read it, and migrate it where they are newer.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_serializer

from cluster.dashboards.options import CustomStyle, PanelOptions
from cluster.dashboards.part import Colour, Part, Unit

SCHEMA_VERSION = 39

PanelType = Literal["stat", "timeseries", "table", "state-timeline", "heatmap", "bargauge"]


class DataSource(Part):
    """Where a query goes; a variable, so that a board can be read from another Prometheus."""

    type: Literal["prometheus"] = "prometheus"
    uid: str = "${datasource}"


class Target(Part):
    """One query of a panel."""

    ref_id: str
    expr: str
    legend_format: str = "__auto"
    format: Literal["time_series", "table", "heatmap"] = "time_series"
    instant: bool = False
    range: bool = True
    editor_mode: Literal["code"] = "code"
    datasource: DataSource = DataSource()


class Threshold(Part):
    """The colour from `value` upwards; the first step's value is None: from the lowest number."""

    color: Colour
    value: float | None

    @model_serializer
    def _whole(self) -> dict[str, Any]:
        return {"color": self.color, "value": self.value}  # null included, unlike elsewhere


class Thresholds(Part):
    mode: Literal["absolute"] = "absolute"
    steps: tuple[Threshold, ...]


class MappedText(Part):
    text: str
    color: Colour
    index: int


class ValueMapping(Part):
    """Texts for values, by value."""

    type: Literal["value"] = "value"
    options: dict[str, MappedText]


class FieldColour(Part):
    mode: Literal["thresholds", "palette-classic", "fixed"]
    fixed_color: Colour | None = None


class DataLink(Part):
    """A link from a value; ${__field.labels.NAME} and ${__url_time_range} are filled in."""

    title: str
    url: str
    target_blank: bool = False


class FieldDefaults(Part):
    unit: Unit = "short"
    decimals: int | None = None
    min: float | None = None
    max: float | None = None
    no_value: str | None = None
    color: FieldColour
    thresholds: Thresholds
    mappings: tuple[ValueMapping, ...] = ()
    links: tuple[DataLink, ...] = ()
    custom: CustomStyle | None = None


class Matcher(Part):
    id: Literal["byName", "byFrameRefID"]
    options: str


class Property(Part):
    id: str
    value: Any


class Override(Part):
    matcher: Matcher
    properties: tuple[Property, ...]


class FieldConfig(Part):
    defaults: FieldDefaults
    overrides: tuple[Override, ...] = ()


class Transformation(Part):
    id: Literal["merge", "organize"]
    options: dict[str, Any]


class GridPos(Part):
    """Place on a grid 24 wide; the board's layout sets all but the width."""

    w: int
    h: int = 0
    x: int = 0
    y: int = 0


class Panel(Part):
    """One panel; the board's layout gives its id and its place."""

    id: int = 0
    grid_pos: GridPos
    type: PanelType
    title: str
    description: str
    datasource: DataSource = DataSource()
    field_config: FieldConfig
    options: PanelOptions
    targets: tuple[Target, ...]
    transformations: tuple[Transformation, ...] = ()
    repeat: str | None = None
    repeat_direction: Literal["h"] | None = None
    max_per_row: int | None = None


class Row(Part):
    """A heading."""

    id: int
    grid_pos: GridPos
    type: Literal["row"] = "row"
    title: str
    collapsed: bool = False
    panels: tuple[Panel, ...] = ()


class Option(Part):
    text: str | tuple[str, ...]
    value: str | tuple[str, ...]
    selected: bool = True


class DataSourceVariable(Part):
    """Which Prometheus is asked."""

    type: Literal["datasource"] = "datasource"
    name: str = "datasource"
    label: str = "Prometheus"
    query: Literal["prometheus"] = "prometheus"
    current: Option
    hide: Literal[0] = 0


class Constant(Part):
    """A value that links need; nobody chooses it."""

    type: Literal["constant"] = "constant"
    name: str
    query: str
    skip_url_sync: bool = True
    hide: Literal[2] = 2


class LabelQuery(Part):
    """label_values(...), as Grafana's Prometheus data source asks for it."""

    query: str
    ref_id: str = "values"


class QueryVariable(Part):
    """A choice among the values of a label."""

    type: Literal["query"] = "query"
    name: str
    label: str
    description: str
    datasource: DataSource = DataSource()
    definition: str
    query: LabelQuery
    regex: str = ""
    refresh: Literal[2] = 2  # when the time range changes
    sort: Literal[1] = 1  # alphabetical
    multi: bool
    include_all: bool
    all_value: str | None = None
    current: Option | None = None
    hide: Literal[0] = 0


class Annotation(Part):
    """Marks on every time axis, from a query: `expr` and `step` are Prometheus's own fields."""

    name: str
    enable: bool = True
    hide: bool = False
    icon_color: Colour
    datasource: DataSource = DataSource()
    expr: str
    step: str = "15s"
    title_format: str
    text_format: str
    tag_keys: str = ""
    use_value_for_time: bool = False


class Link(Part):
    """A link above the panels."""

    type: Literal["link"] = "link"
    title: str
    tooltip: str = ""
    url: str
    icon: Literal["dashboard", "doc"]
    tags: tuple[str, ...] = ()
    as_dropdown: bool = False
    include_vars: bool = False
    keep_time: bool = False
    target_blank: bool = False


class TimeRange(Part):
    from_: str = Field(serialization_alias="from")
    to: str = "now"


class Templating(Part):
    list: tuple[DataSourceVariable | Constant | QueryVariable, ...]


class Annotations(Part):
    list: tuple[Annotation, ...]


class Dashboard(Part):
    """A whole board, as provisioning reads it from a file."""

    uid: str
    title: str
    description: str
    tags: tuple[str, ...] = ("safeft",)
    schema_version: int = SCHEMA_VERSION
    version: int = 1
    editable: bool = False
    graph_tooltip: Literal[1] = 1  # one crosshair over all panels
    timezone: Literal["browser"] = "browser"
    refresh: str = "30s"
    time: TimeRange
    templating: Templating
    annotations: Annotations
    links: tuple[Link, ...]
    panels: tuple[Panel | Row, ...]

    def to_json(self) -> str:
        """As in deploy/grafana/dashboards."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n"

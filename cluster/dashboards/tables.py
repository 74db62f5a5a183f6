"""A table: one line for each value of a label, one column for each expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.dashboards.grafana import (
    DataLink,
    FieldColour,
    FieldConfig,
    FieldDefaults,
    GridPos,
    Matcher,
    Override,
    Panel,
    Property,
    Target,
    Transformation,
)
from cluster.dashboards.options import CellOptions, TableOptions, TableStyle
from cluster.dashboards.panels import Steps, Texts, lettered, mapped, thresholds
from cluster.dashboards.part import Colour, Unit


@dataclass(frozen=True)
class Column:
    """One column of a table: the value of an expression whose labels name the row."""

    title: str
    expr: str
    unit: Unit = "none"
    steps: Steps = ()
    lowest: Colour = "green"
    texts: Texts = ()


def table(
    title: str,
    row: str,
    columns: Sequence[Column],
    description: str,
    *,
    width: int = 24,
    links: Sequence[DataLink] = (),
) -> Panel:
    """One line for each value of the label `row`, one column for each expression.

    Args:
        row: the only label that the expressions leave.
        links: of the row's name; ``${__value.text}`` is that name.
    """
    names = {f"Value #{ref}": column.title for ref, column in lettered(columns)}
    overrides = [Override(matcher=_named(c.title), properties=_cell(c)) for c in columns]
    if links:
        shown = [link.model_dump(by_alias=True) for link in links]
        properties = (Property(id="links", value=shown),)
        overrides.insert(0, Override(matcher=_named(row), properties=properties))
    defaults = FieldDefaults(
        unit="none",
        color=FieldColour(mode="thresholds"),
        thresholds=thresholds((), "text"),
        custom=TableStyle(),
    )
    return Panel(
        grid_pos=GridPos(w=width),
        type="table",
        title=title,
        description=description,
        field_config=FieldConfig(defaults=defaults, overrides=tuple(overrides)),
        options=TableOptions(),
        targets=tuple(
            Target(ref_id=ref, expr=column.expr, format="table", instant=True, range=False)
            for ref, column in lettered(columns)
        ),
        transformations=(
            Transformation(id="merge", options={}),
            Transformation(
                id="organize",
                options={"excludeByName": {"Time": True}, "renameByName": names},
            ),
        ),
    )


def _named(name: str) -> Matcher:
    return Matcher(id="byName", options=name)


def _cell(column: Column) -> tuple[Property, ...]:
    properties = [Property(id="unit", value=column.unit)]
    if column.steps:
        steps = thresholds(column.steps, column.lowest).model_dump(by_alias=True)
        properties.append(Property(id="thresholds", value=steps))
    if column.texts:
        texts = [mapped(column.texts).model_dump(by_alias=True)]
        properties.append(Property(id="mappings", value=texts))
    if column.steps or column.texts:
        cell = CellOptions(type="color-text").model_dump()
        properties.append(Property(id="custom.cellOptions", value=cell))
    return tuple(properties)

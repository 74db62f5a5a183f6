"""What all boards share: layout, variables, marks of the gate's changes, links to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.dashboards.grafana import (
    Annotation,
    Annotations,
    Constant,
    Dashboard,
    DataLink,
    DataSourceVariable,
    GridPos,
    LabelQuery,
    Link,
    Option,
    Panel,
    QueryVariable,
    Row,
    Templating,
    TimeRange,
)
from cluster.dashboards.part import Colour

WIDTH = 24
#: uid of the data source in deploy/grafana/provisioning.
DATA_SOURCE = "safeft-prometheus"
#: Where this repository's docs/ can be read, which each platform decides: see docs/grafana.md.
DOCS = Constant(name="docs", query="http://127.0.0.1:8080")
#: uid and title of every board.
BOARDS = {
    "safeft-fleet": "Fleet safety",
    "safeft-tenant": "Tenant",
    "safeft-screening": "Screening",
    "safeft-training": "Training",
    "safeft-serving": "Serving",
}
_EVERYTHING = Option(text="All", value="$__all")


@dataclass(frozen=True)
class Section:
    """A heading with panels under it, from left to right; a new line where the width is used up."""

    title: str
    height: int
    panels: Sequence[Panel]


def board(
    uid: str,
    description: str,
    sections: Sequence[Section],
    *,
    variables: Sequence[QueryVariable] = (),
    marks: Sequence[Annotation] = (),
    documents: Sequence[Link] = (),
    hours: int = 6,
) -> Dashboard:
    """A board with the variable for the data source and links to the other boards and runbooks."""
    source = DataSourceVariable(current=Option(text="safeft", value=DATA_SOURCE))
    return Dashboard(
        uid=uid,
        title=BOARDS[uid],
        description=description,
        time=TimeRange(from_=f"now-{hours}h"),
        templating=Templating(list=(source, DOCS, *variables)),
        annotations=Annotations(list=tuple(marks)),
        links=(
            *(_to_board(other) for other in BOARDS if other != uid),
            to_docs("Runbooks", "runbooks/"),
            *documents,
        ),
        panels=tuple(_placed(sections)),
    )


def choice(
    name: str,
    label: str,
    query: str,
    description: str,
    *,
    many: bool = True,
    every: str | None = None,
) -> QueryVariable:
    """A variable over the values of a label.

    Args:
        query: label_values(...).
        many: several may be chosen, and all are at first; else the first one is.
        every: what "All" stands for; None: the values that there are.
    """
    return QueryVariable(
        name=name,
        label=label,
        description=description,
        definition=query,
        query=LabelQuery(query=query),
        multi=many,
        include_all=many,
        all_value=every,
        current=_EVERYTHING if many else None,
    )


ALL_MODELS = choice(
    "model", "Model", "label_values(safeft_gate_state, model)", "Served models.", every=".+"
)


def to_board(uid: str, title: str, *values: str) -> DataLink:
    """From a value to a board, with the time range and `values` such as ``var-model=...``."""
    parts = "&".join((*values, "${datasource:queryparam}", "${__url_time_range}"))
    return DataLink(title=title, url=f"/d/{uid}?{parts}")


def to_docs(title: str, page: str) -> Link:
    """From a board to a page of docs/."""
    return Link(title=title, url=f"${{docs}}/{page}", icon="doc", target_blank=True)


def gate_marks(models: str) -> tuple[Annotation, ...]:
    """Where the state of a model that `models` (a label matcher) selects changes."""
    entered: tuple[tuple[str, Colour], ...] = (
        ("quarantined", "red"),
        ("restoring", "purple"),
        ("unknown", "orange"),
        ("healthy", "green"),
    )
    return tuple(
        Annotation(
            name=f"Gate: {state}",
            icon_color=colour,
            expr=_entered(f'safeft_gate_state{{state="{state}", {models}}}'),
            title_format=state,
            text_format="{{model}}",
            tag_keys="model",
        )
        for state, colour in entered
    )


def _entered(series: str) -> str:
    """1 where a state of 0 and 1 has just become 1. Not increase(): it misses new series."""
    return f"{series} == 1 unless {series} offset $__interval == 1"


def _to_board(uid: str) -> Link:
    url = f"/d/{uid}?${{datasource:queryparam}}"
    return Link(title=BOARDS[uid], url=url, icon="dashboard", keep_time=True)


def _placed(sections: Sequence[Section]) -> list[Panel | Row]:
    placed: list[Panel | Row] = []
    y = 0
    for section in sections:
        place = GridPos(x=0, y=y, w=WIDTH, h=1)
        placed.append(Row(id=len(placed) + 1, grid_pos=place, title=section.title))
        x, y = 0, y + 1
        for panel in section.panels:
            width = panel.grid_pos.w
            if x + width > WIDTH:
                x, y = 0, y + section.height
            place = GridPos(x=x, y=y, w=width, h=section.height)
            placed.append(panel.model_copy(update={"id": len(placed) + 1, "grid_pos": place}))
            x += width
        y += section.height
    return placed

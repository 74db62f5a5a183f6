"""A board as a page: its panels drawn from their JSON and from what Prometheus answers.

These are our drawings of Grafana's panels, in its colours; Grafana draws them itself, differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from benchmarks.dashboards.numbers import clock, shown
from benchmarks.dashboards.svg import COLOURS, Line, Mark, Plot, cells, chart, colour_of, timeline
from tests.grafana import Window, choose, filled, repeated, results, text_of
from tests.prometheus_server import Prometheus, Series

WIDTH, UNIT, GAP = 1440, 30, 8
_STYLE = """
* { box-sizing: border-box; margin: 0; }
body { background: #111217; color: #ccccdc; font: 13px sans-serif; width: 1440px; }
header { height: 44px; padding: 12px 16px; font-size: 15px; color: #fff; }
header span { color: #8e8e98; font-size: 12px; margin-left: 14px; }
header b { color: #6e9fff; font-weight: normal; font-size: 12px; margin-left: 12px; }
.panel { position: absolute; background: #181b1f; border: 1px solid #24272d; overflow: hidden; }
.panel h2 { font-size: 13px; font-weight: 500; padding: 7px 10px 3px; white-space: nowrap; }
.row { position: absolute; left: 8px; font-size: 15px; padding-top: 8px; color: #fff; }
.stat { position: absolute; inset: 30px 8px 8px; border-radius: 2px; display: flex;
  align-items: center; justify-content: center; font-size: 32px; font-weight: 500; color: #fff; }
.legend { padding: 0 10px; font-size: 11.5px; line-height: 15px; overflow: hidden; }
.legend i { display: inline-block; width: 12px; height: 3px; margin: 0 5px 3px 0; }
.legend span { margin-right: 13px; white-space: nowrap; display: inline-block; }
.bar { display: flex; align-items: center; height: 22px; padding: 0 10px; font-size: 12px; }
.bar span { width: 46%; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.bar div { flex: 1; background: #22252b; height: 14px; }
.bar div div { height: 14px; }
.bar em { width: 60px; text-align: right; font-style: normal; }
table { width: 100%; border-collapse: collapse; font-size: 12.5px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid #24272d; }
th { color: #6e9fff; font-weight: 500; }
td.number, th.number { text-align: right; }
svg text { font: 11px sans-serif; }
.none { color: #8e8e98; padding: 24px 10px; text-align: center; }
"""


def page(
    board: dict[str, Any], prometheus: Prometheus, window: Window, chosen: Mapping[str, str]
) -> tuple[str, int]:
    """HTML of a board, and its height in pixels."""
    found = choose(board, prometheus, chosen, window)
    marks = _marks(board, prometheus, found, window)
    body, shift, height = [], 0, 0
    for panel in board["panels"]:
        at = panel["gridPos"]
        top = 44 + (at["y"] + shift) * (UNIT + GAP)
        if panel["type"] == "row":
            body.append(f'<div class="row" style="top:{top}px">⌄ {escape(panel["title"])}</div>')
            continue
        copies = list(repeated(panel, board, found))
        per_row = min(len(copies), panel.get("maxPerRow", 1)) if "repeat" in panel else 1
        for number, (one, texts) in enumerate(copies):
            width = 24 // per_row if "repeat" in panel else at["w"]
            column = at["x"] + (number % per_row) * width
            down = number // per_row * at["h"]
            place = (column, top + down * (UNIT + GAP), width, at["h"])
            body.append(_panel(one, texts, prometheus, window, marks, place))
        shift += (-(-len(copies) // per_row) - 1) * at["h"]
        bottom = 44 + (at["y"] + at["h"] + shift) * (UNIT + GAP)
        height = max(height, bottom)
    variables = " ".join(
        f"{variable['label']}: {', '.join(_said(variable, found))}"
        for variable in board["templating"]["list"]
        if variable.get("hide") != 2
    )
    links = "".join(f"<b>{escape(link['title'])}</b>" for link in board["links"])
    head = (
        f"<header>{escape(board['title'])}<span>{escape(variables)}</span>{links}"
        f"<span>{clock(window.start)} to {clock(window.end)}</span></header>"
    )
    text = f"<meta charset=utf-8><style>{_STYLE}</style>{head}{''.join(body)}"
    return text, height + GAP


def _said(variable: dict[str, Any], found: Mapping[str, list[str]]) -> list[str]:
    if variable["type"] == "datasource":
        return [variable["current"]["text"]]
    return ["All"] if variable["multi"] else found[variable["name"]]


def _marks(
    board: dict[str, Any], prometheus: Prometheus, found: Mapping[str, list[str]], window: Window
) -> list[Mark]:
    values = {**text_of(board, found), **window.builtin()}
    marks = []
    for mark in board["annotations"]["list"]:
        for series in prometheus.range(
            filled(mark["expr"], values), window.start + 2 * window.step, window.end, window.step
        ):
            marks += [Mark(at, COLOURS[mark["iconColor"]]) for at, v in series.points if v > 0]
    return marks


def _panel(
    panel: dict[str, Any],
    texts: Mapping[str, str],
    prometheus: Prometheus,
    window: Window,
    marks: list[Mark],
    place: tuple[int, int, int, int],
) -> str:
    x, top, w, h = place
    unit_width = (WIDTH - GAP) / 24
    left, width = GAP + x * unit_width, w * unit_width - GAP
    height = h * (UNIT + GAP) - GAP
    answers = results(panel, texts, prometheus, window)
    draw = {
        "stat": _stat,
        "timeseries": _lines,
        "state-timeline": _states,
        "heatmap": _cells,
        "bargauge": _bars,
        "table": _table,
    }[panel["type"]]
    inside = draw(panel, answers, window, marks, (width - 2, height - 30))
    title = escape(filled(panel["title"], texts))
    style = f"left:{left:.0f}px;top:{top}px;width:{width:.0f}px;height:{height}px"
    return f'<div class="panel" style="{style}"><h2>{title}</h2>{inside}</div>'


Answers = dict[str, list[Series]]
Size = tuple[float, float]
_NONE = '<div class="none">none</div>'


def _stat(panel: dict, answers: Answers, window: Window, marks: list[Mark], size: Size) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    value = _now(answers["A"][0], window) if answers["A"] else None
    if value is None:
        return f'<div class="stat">{escape(defaults["noValue"])}</div>'
    colour = COLOURS[_step(defaults["thresholds"], value)]
    back = colour if panel["options"]["colorMode"] == "background" else "transparent"
    text = escape(shown(value, defaults["unit"]))
    return f'<div class="stat" style="background:{back}">{text}</div>'


def _lines(panel: dict, answers: Answers, window: Window, marks: list[Mark], size: Size) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    looks = {o["matcher"]["options"]: o["properties"] for o in panel["fieldConfig"]["overrides"]}
    lines: list[Line] = []
    for target in panel["targets"]:
        properties = {p["id"]: p["value"] for p in looks.get(target["refId"], [])}
        for series in answers[target["refId"]]:
            colour = colour_of(len(lines))
            if "color" in properties:
                colour = COLOURS[properties["color"]["fixedColor"]]
            name = _legend(target["legendFormat"], series)
            lines.append(Line(name, series.points, colour, "custom.lineStyle" in properties))
    if not lines:
        return _NONE
    custom = defaults["custom"]
    steps = [s for s in defaults["thresholds"]["steps"] if s["value"] is not None]
    limits = [(s["value"], COLOURS[s["color"]]) for s in steps]
    legend = "".join(
        f'<span><i style="background:{line.colour}"></i>{escape(line.name)} '
        f"<b>{escape(shown(line.points[-1][1], defaults['unit']))}</b></span>"
        for line in lines[:12]
    )
    rows = min(4, 1 + sum(len(line.name) * 6.2 + 70 for line in lines[:12]) // size[0])
    plot = Plot(size[0], size[1] - 15 * rows - 8, window)
    picture = chart(
        plot,
        lines,
        defaults["unit"],
        low=defaults.get("min"),
        high=defaults.get("max"),
        stacked=custom["stacking"]["mode"] == "normal",
        limits=limits if custom["thresholdsStyle"]["mode"] != "off" else (),
        marks=marks,
    )
    return f'{picture}<div class="legend" style="height:{15 * rows}px">{legend}</div>'


def _states(panel: dict, answers: Answers, window: Window, marks: list[Mark], size: Size) -> str:
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    texts = {value: (one["text"], one["color"]) for value, one in mapping["options"].items()}
    rows = [(_legend(panel["targets"][0]["legendFormat"], s), s.points) for s in answers["A"]]
    if not rows:
        return _NONE
    plot = Plot(size[0], size[1] - 22, window)
    legend = "".join(
        f'<span><i style="background:{COLOURS[colour]};height:8px"></i>{text}</span>'
        for text, colour in texts.values()
    )
    return f'{timeline(plot, rows, texts, marks)}<div class="legend">{legend}</div>'


def _cells(panel: dict, answers: Answers, window: Window, marks: list[Mark], size: Size) -> str:
    below = sorted(answers["A"], key=lambda s: float(s.labels["le"]))
    columns: dict[float, dict[str, float]] = {}
    seen: dict[float, float] = {}
    for series in below:
        for at, value in series.points:
            columns.setdefault(at, {})[series.labels["le"]] = max(0.0, value - seen.get(at, 0.0))
            seen[at] = max(value, seen.get(at, 0.0))
    if not columns:
        return _NONE
    bounds = [series.labels["le"] for series in below]
    plot = Plot(size[0], size[1] - 6, window)
    return cells(plot, columns, bounds, panel["options"]["yAxis"]["unit"])


def _bars(panel: dict, answers: Answers, window: Window, marks: list[Mark], size: Size) -> str:
    defaults, target = panel["fieldConfig"]["defaults"], panel["targets"][0]
    found = [(s, _now(s, window)) for s in answers["A"]]
    now = [(s, value) for s, value in found if value is not None]
    if target["format"] == "heatmap":
        now.sort(key=lambda pair: float(pair[0].labels["le"]))
        values = [v for _, v in now]
        now = [(s, v - before) for (s, v), before in zip(now, [0.0, *values], strict=False)]
    if not now:
        return _NONE
    most = max(value for _, value in now) or 1.0
    rows = []
    for series, value in now:
        colour = COLOURS[_step(defaults["thresholds"], value)]
        name = escape(_legend(target["legendFormat"], series))
        text = escape(shown(value, defaults["unit"]))
        bar = f'<div style="width:{100 * value / most:.1f}%;background:{colour}"></div>'
        rows.append(
            f'<div class="bar"><span>{name}</span><div>{bar}</div>'
            f'<em style="color:{colour}">{text}</em></div>'
        )
    return "".join(rows)


def _table(panel: dict, answers: Answers, window: Window, marks: list[Mark], size: Size) -> str:
    names = panel["transformations"][1]["options"]["renameByName"]
    looks = {o["matcher"]["options"]: o["properties"] for o in panel["fieldConfig"]["overrides"]}
    rows: dict[str, dict[str, float]] = {}
    label = ""
    for ref, answer in answers.items():
        for series in answer:
            ((label, row),) = series.labels.items()
            value = _now(series, window)
            if value is not None:
                rows.setdefault(row, {})[names[f"Value #{ref}"]] = value
    if not rows:
        return _NONE
    columns = [names[f"Value #{ref}"] for ref in answers]
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in columns)
    lines = []
    for row, values in sorted(rows.items()):
        line = [f"<td>{escape(row)}</td>"]
        for name in columns:
            properties = {p["id"]: p["value"] for p in looks[name]}
            line.append(_cell(values.get(name), properties))
        lines.append(f"<tr>{''.join(line)}</tr>")
    return f"<table><tr><th>{label}</th>{head}</tr>{''.join(lines)}</table>"


def _cell(value: float | None, properties: dict[str, Any]) -> str:
    if value is None:
        return '<td class="number"></td>'
    text, colour = shown(value, properties["unit"]), COLOURS["text"]
    if "mappings" in properties:
        one = properties["mappings"][0]["options"][str(round(value))]
        text, colour = one["text"], COLOURS[one["color"]]
    elif "thresholds" in properties:
        colour = COLOURS[_step(properties["thresholds"], value)]
    return f'<td class="number" style="color:{colour}">{escape(text)}</td>'


def _step(thresholds: dict[str, Any], value: float) -> str:
    """The colour of a number."""
    steps = thresholds["steps"]
    return [s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]


def _now(series: Series, window: Window) -> float | None:
    """What it is at the end of the window."""
    at, value = series.points[-1]
    return value if at >= window.end - 1.5 * window.step else None


def _legend(template: str, series: Series) -> str:
    return re.sub(
        r"\{\{\s*(\w+)\s*\}\}", lambda found: series.labels.get(found[1], ""), template
    ).strip()

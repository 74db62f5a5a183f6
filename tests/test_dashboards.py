"""Grafana's dashboards: what is committed is what the code says, and it asks for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.dashboards import dashboards
from cluster.dashboards.board import BOARDS, DATA_SOURCE
from cluster.dashboards.panels import thresholds
from cluster.dashboards.promql import AGES, STATES
from cluster.gate.policy import MAX_AGE_S
from cluster.gate.record import OLD
from cluster.gate.states import State
from cluster.metrics import METRICS
from tests.grafana import filled, panels

ROOT = Path(__file__).parent.parent
GRAFANA = ROOT / "deploy" / "grafana"
SCHEMA = json.loads((Path(__file__).parent / "grafana_dashboard.schema.json").read_text())
COMMITTED = sorted((GRAFANA / "dashboards").glob("*.json"))
ALERTS = (ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml").read_text()

boards = pytest.mark.parametrize(
    "board",
    [json.loads(path.read_text()) for path in COMMITTED],
    ids=[path.stem for path in COMMITTED],
)


def expressions(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that a board asks Prometheus."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for mark in board["annotations"]["list"]:
        yield mark["name"], mark["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert asked, variable["definition"]
            yield variable["name"], f"sum by ({asked[2]}) ({asked[1]})"


def urls(board: dict[str, Any]) -> Iterator[str]:
    """Every link of a board: above it, from values, and from names in tables."""
    yield from (link["url"] for link in board["links"])
    for panel in panels(board):
        config = panel["fieldConfig"]
        properties = [p for o in config["overrides"] for p in o["properties"]]
        shown = [*config["defaults"]["links"]]
        shown += [link for p in properties if p["id"] == "links" for link in p["value"]]
        yield from (link["url"] for link in shown)


def test_what_is_committed_is_what_the_code_generates() -> None:
    generated = {name: board.to_json() for name, board in dashboards().items()}
    committed = {path.name: path.read_text() for path in COMMITTED}
    assert committed == generated, "run `python -m cluster.dashboards` and commit the result"
    assert {name.removesuffix(".json") for name in generated} == BOARDS.keys()


@boards
def test_a_board_is_valid_by_grafanas_schema(board: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(board, SCHEMA)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("panels", 1, "options", "colorMode"), "backgrund"),
        (("panels", 1, "fieldConfig", "defaults", "thresholds", "steps", 0), {"color": "red"}),
        (("panels", 1, "targets", 0, "exprs"), "up"),
        (("time", "from"), None),
        (("templating", "list", 0, "type"), "choice"),
    ],
)
def test_the_schema_notices_a_mistake(path: tuple[Any, ...], wrong: Any) -> None:
    board = json.loads(COMMITTED[0].read_text())
    place = board
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(board, SCHEMA)


@boards
def test_every_expression_uses_metrics_and_labels_that_there_are(board: dict[str, Any]) -> None:
    asked = 0
    for where, expr in expressions(board):
        for name, labels in selectors(expr):
            asked += 1
            if name == "ALERTS":  # Prometheus's own: the alerts of deploy/prometheus
                assert set(labels) <= {"alertname", "alertstate"}, where
                continue
            metric = METRICS.get(re.sub(r"_(bucket|sum|count)$", "", name)) or METRICS.get(name)
            assert metric is not None, f"{where}: there is no metric {name}"
            assert name == metric.name or metric.kind == "histogram", f"{where}: {name}"
            known = {*metric.labels, *(["le"] if name.endswith("_bucket") else [])}
            assert set(labels) <= known, f"{where}: {name} has labels {sorted(known)}"
    assert asked > 10


def test_selectors_are_found_wherever_they_stand() -> None:
    expr = (
        'sum by (le, route) (rate(a_bucket{route=~"$route", x!="{y}"}[5m])) / on (model) '
        "(b > 0) unless c offset $__range == bool 1 or vector(0)"
    )
    # The labels of `by` count for what is inside; here for all, which asks for more.
    assert selectors(expr) == [("a_bucket", ["route", "x"]), ("b", []), ("c", [])]


@boards
def test_counters_are_shown_as_they_grow_and_gauges_as_they_are(board: dict[str, Any]) -> None:
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for where, expr in expressions(board):
        for name, _ in selectors(expr):
            metric = METRICS.get(re.sub(r"_(bucket|sum|count)$", "", name)) or METRICS.get(name)
            if metric is None or where in variables:
                continue
            grows = re.search(rf"(rate|increase|clamp_min)\({name}\b", expr) is not None
            assert grows == (metric.kind != "gauge"), f"{where}: {name}"


@boards
def test_what_several_controllers_say_of_the_same_jobs_is_not_added_up(
    board: dict[str, Any],
) -> None:
    variables = {v["name"] for v in board["templating"]["list"]}
    for where, expr in expressions(board):
        for name, _ in selectors(expr):
            metric = METRICS.get(name)
            if metric is not None and metric.across == "max" and where not in variables:
                assert re.search(rf"max( by \([^)]*\) )?\((clamp_min\()?{name}\b", expr), where


@boards
def test_panels_have_their_own_number_and_title_and_do_not_overlap(board: dict[str, Any]) -> None:
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(board):
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


@boards
def test_thresholds_rise_and_begin_at_the_lowest_number(board: dict[str, Any]) -> None:
    for panel in panels(board):
        config = panel["fieldConfig"]
        properties = [p for o in config["overrides"] for p in o["properties"]]
        found = [p["value"] for p in properties if p["id"] == "thresholds"]
        for one in (config["defaults"]["thresholds"], *found):
            lowest, *others = [step["value"] for step in one["steps"]]
            assert lowest is None
            assert others == sorted(set(others)), panel["title"]


def test_thresholds_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="must rise"):
        thresholds([(2, "red"), (1, "orange")])


@boards
def test_links_lead_to_boards_with_their_variables_and_to_pages(board: dict[str, Any]) -> None:
    known = {other["uid"]: other for other in (json.loads(p.read_text()) for p in COMMITTED)}
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    reached = set()
    for url in urls(board):
        if page := re.fullmatch(r"\$\{docs\}/([\w./-]+)?(#[\w-]+)?", url):
            assert (ROOT / "docs" / page[1]).exists(), url
            continue
        if url.startswith("${docs}/runbooks/${__field.labels.alertname}.md"):
            for alert in re.findall(r"- alert: (\w+)", ALERTS):
                assert (ROOT / "docs" / "runbooks" / f"{alert}.md").is_file(), alert
            continue
        found = re.match(r"/d/([\w-]+)\?", url)
        assert found and found[1] in known, url
        reached.add(found[1])
        for name, value in re.findall(r"var-(\w+)=([^&]+)", url):
            assert name in {v["name"] for v in known[found[1]]["templating"]["list"]}, url
            if inner := re.fullmatch(r"\$(\w+)", value):
                assert inner[1] in variables, url
    assert reached >= known.keys() - {board["uid"]}


@boards
def test_variables_are_defined_before_they_are_used(board: dict[str, Any]) -> None:
    builtin = dict.fromkeys(("__interval", "__rate_interval", "__range"), "1m")
    seen: dict[str, str] = dict(builtin)
    for variable in board["templating"]["list"]:
        filled(str(variable.get("definition", "")), seen)
        seen[variable["name"]] = "x"
    for _, expr in expressions(board):
        filled(expr, seen)
    for panel in panels(board):
        filled(panel["title"], seen)
        assert panel.get("repeat", "datasource") in seen


@boards
def test_values_that_grafana_escapes_for_patterns_are_used_in_patterns(
    board: dict[str, Any],
) -> None:
    multi = {v["name"] for v in board["templating"]["list"] if v.get("multi")}
    for where, expr in expressions(board):
        assert not set(re.findall(r'[^~]"\$(\w+)"', expr)) & multi, where


def test_the_gates_states_and_its_age_limit_are_the_gates_own() -> None:
    assert {state for state, _ in STATES} == {state.value for state in State}
    ages = {
        step["value"]
        for path in COMMITTED
        for panel in panels(json.loads(path.read_text()))
        if "good round" in panel["title"]
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    }
    assert ages == {None, OLD * MAX_AGE_S, MAX_AGE_S} == {None, *(age for age, _ in AGES)}


def test_the_source_that_is_provisioned_is_the_one_that_boards_begin_with() -> None:
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "safeft.yml").read_text())[
        "datasources"
    ]
    assert (source["uid"], source["type"]) == (DATA_SOURCE, "prometheus")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "safeft.yml").read_text())[
        "providers"
    ]
    assert provider["type"] == "file"
    for path in COMMITTED:
        first = json.loads(path.read_text())["templating"]["list"][0]
        assert first["current"]["value"] == DATA_SOURCE


_WORDS = {
    *("by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool"),
    *("and", "or", "unless", "inf", "nan", "start", "end", "atan2"),
}


def selectors(expr: str) -> list[tuple[str, list[str]]]:
    """Every series selector of an expression: its metric and the labels it matches.

    Label lists of aggregations and of vector matching count as matched by the selectors after them
    only where `expressions` says so; PromQL's own words and functions are left out.
    """
    found = []
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", expr)
    strings: list[str] = []

    def keep(match: re.Match[str]) -> str:
        strings.append(match[0])
        return '""'

    text = re.sub(r'"(?:\\.|[^"\\])*"', keep, text)
    text = re.sub(r"\[[^\]]*\]", " ", text)
    text = re.sub(r"offset\s+\S+", " ", text)
    for match in re.finditer(r"(?<![\w$.])([a-zA-Z_]\w*)?\s*(\{[^}]*\}|(?!\s*\()(?!\w))", text):
        name, matchers = match[1], match[2]
        if name is None and not matchers:
            continue
        if name in _WORDS:
            continue
        labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
        if "__name__" in labels:
            (names,) = [s for s in strings if "safeft_" in s]
            found += [(one, []) for one in names.strip('"').split("|")]
        elif name is not None:
            found.append((name, labels))
    return found

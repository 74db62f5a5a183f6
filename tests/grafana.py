"""What Grafana does with a dashboard before Prometheus sees it: variables, intervals, queries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.prometheus_server import Prometheus, Series

_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)(?::\w+)?\}")


@dataclass(frozen=True)
class Window:
    """The time range of a board, in seconds since 1970, and the step of its lines."""

    start: float
    end: float
    step: float
    rate: float

    def builtin(self) -> dict[str, str]:
        """Grafana's own variables."""
        return {
            "__interval": f"{max(1, round(self.step))}s",
            "__rate_interval": f"{max(1, round(self.rate))}s",
            "__range": f"{max(1, round(self.end - self.start))}s",
        }


def filled(text: str, values: Mapping[str, str]) -> str:
    """A query or title with its variables filled in. KeyError where one is not defined."""
    return _VARIABLE.sub(lambda found: values[found[1] or found[2]], text)


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Every panel that shows something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def choose(
    board: dict[str, Any], prometheus: Prometheus, chosen: Mapping[str, str], window: Window
) -> dict[str, list[str]]:
    """The values that each variable of a board is set to.

    Args:
        chosen: instead of the first value, for variables of which one is chosen.

    Raises:
        AssertionError: a variable has no value to choose.
    """
    found: dict[str, list[str]] = {}
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            found[variable["name"]] = [str(variable.get("query"))]
            continue
        query = filled(variable["definition"], text_of(board, found))
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert asked, query
        values = prometheus.label_values(asked[2], asked[1], window.start, window.end)
        assert values, f"{board['title']}: no value for {variable['name']}: {query}"
        if not variable["multi"]:
            values = [chosen.get(variable["name"], values[0])]
        found[variable["name"]] = values
    return found


def text_of(board: dict[str, Any], found: Mapping[str, list[str]]) -> dict[str, str]:
    """What Grafana puts into a query for the values of variables: one, all, or any of several."""
    every = {v["name"]: v.get("allValue") for v in board["templating"]["list"]}
    multi = {v["name"] for v in board["templating"]["list"] if v.get("multi")}
    texts = {}
    for name, values in found.items():
        if name not in multi:
            (texts[name],) = values
        elif every[name]:
            texts[name] = every[name]
        else:
            escaped = [re.sub(r"([\\^$.*+?()\[\]{}|])", r"\\\\\1", value) for value in values]
            texts[name] = escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
    return texts


def repeated(
    panel: dict[str, Any], board: dict[str, Any], found: Mapping[str, list[str]]
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """A panel with the variables' texts; several times, with one value each, if it repeats."""
    texts = text_of(board, found)
    for value in found[panel["repeat"]] if "repeat" in panel else [None]:
        yield panel, texts if value is None else {**texts, panel["repeat"]: value}


def results(
    panel: dict[str, Any], texts: Mapping[str, str], prometheus: Prometheus, window: Window
) -> dict[str, list[Series]]:
    """What Prometheus answers to each query of a panel over the window, by its letter.

    Queries of one moment are asked over the window as well: what a number shows lasts as long as
    what it counts, a running training say.
    """
    values = {**texts, **window.builtin()}
    return {
        target["refId"]: prometheus.range(
            filled(target["expr"], values), window.start, window.end, window.step
        )
        for target in panel["targets"]
    }

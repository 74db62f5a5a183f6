"""A real Prometheus, asked over its HTTP API."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import yaml

from cluster import prometheus


@dataclass(frozen=True)
class Series:
    """One series of an answer: labels, and (time, value) without NaN."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def range(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """Series with at least one number. ValueError with Prometheus's words for a bad query."""
        found = self._get("query_range", query=expr, start=start, end=end, step=step)
        series = []
        for one in found["result"]:
            points = [(float(at), float(value)) for at, value in one["values"]]
            points = [(at, value) for at, value in points if not math.isnan(value)]
            if points:
                series.append(Series(one["metric"], points))
        return series

    def label_values(self, label: str, selector: str, start: float, end: float) -> list[str]:
        """The values of a label over the series that a selector finds, sorted."""
        asked: dict[str, Any] = {"match[]": selector, "start": start, "end": end}
        return sorted(self._get(f"label/{label}/values", **asked))

    def targets_up(self) -> int:
        """How many pages have been read."""
        targets = self._get("targets", state="active")["activeTargets"]
        return sum(target["health"] == "up" for target in targets)

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _get(self, path: str, **params: Any) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=params).json()
        if answer["status"] != "success":
            raise ValueError(f"{answer.get('error')}: {params}")
        return answer["data"]


@contextmanager
def watching(executable: str, home: Path, pages: Sequence[str], every: str) -> Iterator[Prometheus]:
    """The Prometheus of `deploy/prometheus`, rules and all, which reads `pages` (HOST:PORT) `every`
    so often: the first as the pool's, the others as controllers'.
    """
    config = home / "deploy"
    shutil.copytree(prometheus.CONFIG, config)
    file = config / "prometheus.yml"
    file.write_text(file.read_text().replace("_interval: 5s", f"_interval: {every}"))
    targets = home / "run" / "targets"
    targets.mkdir(parents=True)
    (targets / "controllers.yml").write_text(yaml.safe_dump([{"targets": [*pages[1:]]}]))
    pool, port = f"http://{pages[0]}/metrics", prometheus.free_port(0)
    with (
        mock.patch.object(prometheus, "CONFIG", config),
        prometheus.running_prometheus(executable, home / "run", port, pool, []) as url,
    ):
        client = Prometheus(url)
        deadline = time.monotonic() + 120
        while client.targets_up() < len(pages):
            assert time.monotonic() < deadline, "its targets are not up"
            time.sleep(0.1)
        yield client
        client.close()

"""Every expression of every panel, asked of a real Prometheus that scrapes a pool and a controller.

The tokens are a tiny model's and the probes the prober's own; whether it refuses, and what the
stages of jobs report, is scripted. `python -m benchmarks.dashboards` does the same with real jobs.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.controller.numbers import READ_EVERY_S
from cluster.controller.runner import Numbers, Report
from cluster.exporter import Exporter
from cluster.metrics import METRICS
from cluster.state import Database
from tests.control.stages import World
from tests.dashboard_world import Pool
from tests.grafana import Window, choose, filled, panels, repeated, results, text_of
from tests.prometheus_server import Prometheus, watching

EXECUTABLE = shutil.which("prometheus") or ""
pytestmark = pytest.mark.skipif(
    not EXECUTABLE,
    reason="Prometheus is not installed: `apt-get install prometheus`, and this test runs",
)
BOARDS = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboards"
TENANT = "ten_a"
STEP = {
    "step": 3.0,
    "total_steps": 12.0,
    "loss": 2.5,
    "grad_norm": 1.5,
    "seconds": 4.0,
    "penalty/asft": 0.25,
    "asft/orthogonal_fraction": 0.5,
    "cwac/weight_drift": 2e-5,
    "cwac/weight_drift_limit": 1e-5,
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One job that is done, one whose dataset was rejected, one in training."""
    root = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.controller.numbers.READ_EVERY_S", -READ_EVERY_S)
        database = Database(f"sqlite:///{root / 'state.db'}")
        database.migrate()
        world = World(database, root)
        scores = [0] * (len(METRICS["safeft_sqsd_score"].buckets) + 1)
        scores[4], scores[-2] = 96, 4
        scored = Numbers(quiet_s=0.0, scores=scores, score_sum=-90.0)
        facts = {"verdict": "accepted", "rows": 100, "risky": 4, "unscored": 1}
        accepted = Report("done", facts=facts, numbers=scored)
        facts = {**facts, "verdict": "rejected"}
        rejected = Report("refused", code="dataset_rejected", facts=facts, numbers=scored)
        violated = Numbers(quiet_s=2.0, step=STEP, violations={"cwac": 3})
        trained = Report("done", facts={"trained_tokens": 500}, numbers=violated)
        for number, (screening, training) in enumerate(
            [
                (accepted, trained),
                (rejected, trained),
                (accepted, Report("running", numbers=violated)),
            ]
        ):
            world.runner.script |= {"screening": screening, "training": training}
            world.add_job(f"ftjob-{number}")
            world.round(6)
        yield world
        database.close()


@pytest.fixture(scope="module")
def pool(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A base model and two of a tenant's; one of them stops refusing."""
    made = Pool(tiny_dir, tmp_path_factory.mktemp("pool"), probe_every_s=1.0)
    made.add(f"ft:tiny:{TENANT}:good:000000000001", 1)
    bad = made.add(f"ft:tiny:{TENANT}:bad:000000000002", 2)
    made.model.refuses[bad] = 0.2
    yield made
    made.close()


@pytest.fixture(scope="module")
def prometheus(
    pool: Pool, jobs: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    pages = []
    for name, recorder in (("pool", pool.stack.recorder), ("controller", jobs.recorder)):
        page = Exporter()
        page.include(name, recorder)
        pages.append(f"127.0.0.1:{page.listen('127.0.0.1', 0)}")
    stop = threading.Event()

    def talk() -> None:
        models = ["base", f"ft:tiny:{TENANT}:good:000000000001", "nobody"]
        number = 0
        while not stop.wait(0.2):
            number += 1
            pool.ask(models[number % 3], stream=number % 2 == 0)

    talking = threading.Thread(target=talk)
    talking.start()
    home = tmp_path_factory.mktemp("prometheus")
    with watching(EXECUTABLE, home, pages, "1s") as server:
        yield server
    stop.set()
    talking.join()


def test_every_expression_of_every_panel_has_data(prometheus: Prometheus) -> None:
    began = time.time()
    boards = [json.loads(path.read_text()) for path in sorted(BOARDS.glob("*.json"))]
    deadline = time.monotonic() + 120
    while missing := list(unanswered(boards, prometheus, began)):
        assert time.monotonic() < deadline, "\n".join(missing)
        time.sleep(1)


def unanswered(boards: list[dict], prometheus: Prometheus, began: float) -> Iterator[str]:
    """What has no data yet: variables, panels' queries; marks need none, but must be PromQL."""
    now = time.time()
    window = Window(min(began, now - 2), now, step=1, rate=4)
    for board in boards:
        try:
            found = choose(board, prometheus, {}, window)
        except AssertionError as error:
            yield str(error)
            continue
        for panel in panels(board):
            for one, texts in repeated(panel, board, found):
                for letter, series in results(one, texts, prometheus, window).items():
                    if not series:
                        yield f"{board['title']}: {panel['title']} {letter}"
        values = {**text_of(board, found), **window.builtin()}
        for mark in board["annotations"]["list"]:
            prometheus.range(filled(mark["expr"], values), window.start, window.end, 1)

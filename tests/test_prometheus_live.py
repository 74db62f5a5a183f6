"""A real Prometheus beside us: it comes and goes with the pool, and sees a quarantine end."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster import prometheus
from cluster.exporter import Exporter
from safeft.errors import InputError
from tests.test_prober import Lab

ROOT = Path(__file__).parent.parent
EXECUTABLE = shutil.which("prometheus") or ""
needs_prometheus = pytest.mark.skipif(
    not EXECUTABLE,
    reason="Prometheus is not installed: `apt-get install prometheus`, and these tests run",
)


@pytest.fixture
def lab(tiny_dir: Path, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tiny_dir, tmp_path)
    yield made
    made.stack.close()


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same configuration, looking every second."""
    copy = tmp_path / "deploy"
    shutil.copytree(prometheus.CONFIG, copy)
    file = copy / "prometheus.yml"
    file.write_text(file.read_text().replace("_interval: 5s", "_interval: 1s"))
    monkeypatch.setattr(prometheus, "CONFIG", copy)


def eventually(met: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def ask(url: str, expression: str) -> list[dict[str, str]]:
    """The labels of what an expression yields."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=60).json()
    assert answer["status"] == "success", answer
    return [one["metric"] for one in answer["data"]["result"]]


def firing(url: str) -> set[tuple[str, str]]:
    found = ask(url, 'ALERTS{alertstate="firing"}')
    return {(one["alertname"], one.get("model", "")) for one in found}


@needs_prometheus
def test_an_alert_fires_from_a_real_quarantine_and_resolves_after_the_release(
    lab: Lab, tmp_path: Path, quick: None
) -> None:
    weights = lab.register("acme/bot", 1)
    lab.register("other/bot", 2)
    exporter = Exporter()
    exporter.include("stack", lab.stack.recorder)
    page = f"http://127.0.0.1:{exporter.listen('127.0.0.1', 0)}/metrics"
    port = prometheus.free_port(0)
    with prometheus.running_prometheus(EXECUTABLE, tmp_path / "p", port, page, []) as url:
        lab.look()
        eventually(lambda: len(ask(url, 'safeft_gate_state{state="healthy"} == 1')) == 3)
        assert firing(url) == set()
        lab.person.refuses[weights] = 0.0
        lab.stack.do(lab.stack.keeper.probe_now("acme/bot"))
        lab.look()
        assert lab.ask("acme/bot").json()["error"]["code"] == "safety_quarantined"
        eventually(lambda: ("SafeftGateQuarantined", "acme/bot") in firing(url))
        assert {model for _, model in firing(url)} == {"acme/bot"}
        assert lab.ask("other/bot").status_code == 200
        lab.stack.do(lab.stack.keeper.decide("release", "acme/bot", "me", "a false alarm"))
        eventually(lambda: ("SafeftGateQuarantined", "acme/bot") not in firing(url))
        assert ask(url, 'safeft_gate_state{model="acme/bot",state="healthy"} == 1')
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


@needs_prometheus
def test_prometheus_ends_even_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cluster.prometheus import free_port, running_prometheus\n"
        "run = running_prometheus(sys.argv[1], Path(sys.argv[2]), free_port(0),\n"
        "                         'http://127.0.0.1:9/metrics', [])\n"
        "with run as url:\n"
        "    print(url, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, EXECUTABLE, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    assert httpx.get(f"{url}/-/ready", timeout=60).is_success
    children = psutil.Process(parent.pid).children()
    assert children
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@needs_prometheus
def test_one_that_does_not_start_says_why_and_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no directory")
    page = "http://127.0.0.1:9/metrics"
    with (
        pytest.raises(InputError, match=r"does not start \(.*prometheus\.log.*--no-prometheus"),
        prometheus.running_prometheus(EXECUTABLE, tmp_path, prometheus.free_port(0), page, []),
    ):
        pytest.fail("it runs")


def test_it_is_taken_if_it_is_there_and_missed_only_if_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert prometheus.program(None) is None
    with pytest.raises(InputError, match="prometheus is not there"):
        prometheus.program(True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert prometheus.program(None) == prometheus.program(True) == "/somewhere/prometheus"
    assert prometheus.program(False) is None
    monkeypatch.setattr(prometheus, "CONFIG", Path("nowhere"))
    assert prometheus.program(None) is None
    with pytest.raises(InputError, match="nowhere is not there"):
        prometheus.program(True)


def test_a_port_that_is_taken_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--prometheus-port: .*:{port} .*--no-prometheus"):
            prometheus.free_port(port)


def test_the_configuration_is_the_deployed_one_at_the_pools_addresses(tmp_path: Path) -> None:
    found = prometheus.configuration(tmp_path, "http://127.0.0.1:4711/metrics", ["10.0.0.1:8080"])
    deployed = yaml.safe_load((prometheus.CONFIG / "prometheus.yml").read_text())
    assert found["global"] == deployed["global"]
    (pattern,) = found["rule_files"]
    assert Path(pattern).is_absolute() and len(list(Path(pattern).parent.glob("*.yml"))) == 2
    jobs = {job["job_name"]: job for job in found["scrape_configs"]}
    assert jobs.keys() == {job["job_name"] for job in deployed["scrape_configs"]}
    assert jobs["safeft"]["static_configs"] == [{"targets": ["127.0.0.1:4711"]}]
    assert jobs["ray"]["static_configs"] == [{"targets": ["10.0.0.1:8080"]}]
    (listed,) = jobs["safeft-controller"]["file_sd_configs"]
    assert listed["files"] == [f"{tmp_path}/targets/controllers*.yml"]
    assert (tmp_path / "targets").is_dir()

"""The Prometheus configuration: valid, every alert tested and explained, no metric that is not."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cluster.cli.main import app
from cluster.metrics import METRICS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy" / "prometheus"
RUNBOOKS = ROOT / "docs" / "runbooks"
RULES = sorted((DEPLOY / "rules").glob("*.yml"))
RULE_TESTS = sorted((DEPLOY / "tests").glob("*.yml"))
CONFIGS = sorted(DEPLOY.glob("prometheus*.yml"))
SECTIONS = ["What it means", "How to look", "What to do", "When it resolves"]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed: `apt-get install prometheus` brings it, and these tests run",
)
needs_amtool = pytest.mark.skipif(
    shutil.which("amtool") is None,
    reason="amtool is not installed: `apt-get install prometheus-alertmanager` brings it",
)


def rules(kind: str) -> dict[str, dict[str, Any]]:
    """By name: the alerts, or with "record" what is recorded."""
    found = {}
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            found |= {rule[kind]: rule for rule in group["rules"] if kind in rule}
    return found


ALERTS = rules("alert")


def expectations(alert: str) -> list[str]:
    """Of each rule test: whether it expects the alert to fire (F) or not (-), in order."""
    return [
        "".join(
            "F" if one["exp_alerts"] else "-"
            for one in test["alert_rule_test"]
            if one["alertname"] == alert
        )
        for path in RULE_TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
    ]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unknown_names(text: str) -> set[str]:
    """Names in an expression that are neither in the table of metrics nor recorded by a rule."""
    recorded = rules("record").keys()
    tokens = set(re.findall(r"[\w:]*safeft[\w:]*", re.sub(r'"[^"]*"', "", text)))
    series = {
        name + end
        for name, metric in METRICS.items()
        for end in (["_bucket", "_sum", "_count"] if metric.kind == "histogram" else [""])
    }
    return tokens - series - recorded


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert alert.startswith("Safeft")
    assert rule["labels"] == {"severity": rule["labels"]["severity"]}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{alert}.md"
    page = (RUNBOOKS / f"{alert}.md").read_text()
    assert page.startswith(f"# {alert}\n\n{rule['labels']['severity']}. ")
    assert re.findall(r"^## (.*)$", page, re.M) == SECTIONS


def test_every_runbook_has_its_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == ALERTS.keys()


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_test_in_which_it_does_not_fire_then_fires_then_resolves(
    alert: str,
) -> None:
    assert any(re.search("-F+-", expected) for expected in expectations(alert))


@pytest.mark.parametrize("name", [*ALERTS, *rules("record")])
def test_rules_ask_only_for_metrics_that_there_are(name: str) -> None:
    rule = (ALERTS | rules("record"))[name]
    assert not unknown_names(rule["expr"])
    for label, value in re.findall(r'\b(\w+)=~?"([^"]*)"', rule["expr"]):
        assert label == "job" or any(label in metric.labels for metric in METRICS.values()), label
        assert value


def test_a_metric_that_there_is_not_is_noticed() -> None:
    assert unknown_names('safeft_refusals{model="a"}') == {"safeft_refusals"}
    assert unknown_names("safeft_request_seconds") == {"safeft_request_seconds"}  # a histogram
    assert unknown_names("safeft:no:such") == {"safeft:no:such"}
    assert unknown_names("safeft_request_seconds_bucket + safeft_jobs") == set()


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_runbooks_ask_for_metrics_and_commands_that_there_are(page: Path) -> None:
    text = page.read_text()
    for block in re.findall(r"```promql\n(.*?)```", text, re.S):
        assert not unknown_names(block)
    assert not unknown_names(" ".join(re.findall(r"`(safeft_[^`]*)`", text)))
    root = typer.main.get_command(app)
    commands = re.findall(r"\bsafeft ((?:[a-z]+ ?)+)([^`;\n]*)", "\n".join(_code(text)))
    for words, rest in commands:
        command: Any = root
        for word in words.split():
            if not hasattr(command, "commands"):
                break  # an argument
            assert word in command.commands, f"safeft {words}"
            command = command.commands[word]
        known = {option for parameter in command.params for option in parameter.opts}
        used = set(re.findall(r"--[a-z-]+", rest.partition("#")[0]))
        assert used <= known, f"safeft {words}{rest}"
        given, takes = _arguments(command, rest), _takes(command)
        assert len(given) <= takes, f"safeft {words}{rest}"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:deploy|docs|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def _takes(command: Any) -> int:
    return sum(parameter.param_type_name == "argument" for parameter in command.params)


def _arguments(command: Any, rest: str) -> list[str]:
    """What is no option and no option's value."""
    flags = {name for p in command.params if getattr(p, "is_flag", False) for name in p.opts}
    given, words = [], iter(shlex.split(rest, comments=True))
    for word in words:
        if not word.startswith("-"):
            given.append(word)
        elif word not in flags:
            next(words, None)
    return given


def test_an_argument_that_a_command_does_not_take_is_noticed() -> None:
    commands: Any = typer.main.get_command(app)
    evaluate, models = commands.commands["evaluate"], commands.commands["models"]
    assert _arguments(evaluate, "MODEL") == ["MODEL"] and _takes(evaluate) == 0
    assert _arguments(evaluate, "--model SOURCE --json  # the base model") == []
    assert _takes(models.commands["add"]) == len(_arguments(models.commands["add"], "M DIR")) == 2


def _code(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"`(safeft [^`]*)`", text)


def test_alerts_that_the_example_for_alertmanager_names_exist() -> None:
    text = (DEPLOY / "alertmanager.yml").read_text()
    assert set(re.findall(r"Safeft\w+", text)) <= ALERTS.keys()
    receivers = {one["name"] for one in yaml.safe_load(text)["receivers"]}
    assert set(re.findall(r"receiver: (\w+)", text)) == receivers


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_both_ways_to_find_targets_feed_the_same_rules(config: Path) -> None:
    found = yaml.safe_load(config.read_text())
    assert found["rule_files"] == ["rules/*.yml"]
    jobs = {job["job_name"] for job in found["scrape_configs"]}
    assert jobs == {"safeft", "safeft-controller", "ray"}
    asked = "".join(rule["expr"] for rule in ALERTS.values())
    assert set(re.findall(r'job="([^"]+)"', asked)) <= jobs


@needs_promtool
def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", *RULES)
    promtool("check", "config", DEPLOY / "prometheus.yml")


@needs_promtool
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_promtool_sees_every_alert_fire_and_resolve(path: Path) -> None:
    promtool("test", "rules", path)


@needs_amtool
def test_amtool_accepts_the_example_for_alertmanager() -> None:
    command = ["amtool", "check-config", str(DEPLOY / "alertmanager.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


HEAD, WORKER = "ray-head-x", "ray-worker-y"


def pods() -> list[dict[str, Any]]:
    """A KubeRay cluster's pods as Kubernetes' discovery shows them: a target for each port."""
    ray = {HEAD: "head", WORKER: "worker"}
    ports = {"safeft-metrics": 9400, "metrics": 8080, "client": 10001}
    found = []
    for pod, kind in ray.items():
        for name, port in ports.items():
            labels = {"ray_io_is_ray_node": "yes", "ray_io_node_type": kind}
            found.append(_target(pod, name, port, **labels))
    controller = {"app_kubernetes_io_name": "safeft-controller"}
    found.append(_target("controller", "safeft-metrics", 9401, **controller))
    found.append(_target("controller", "http", 80, **controller))
    found.append(_target("somebody-else", "metrics", 8080))
    return found


def _target(pod: str, port_name: str, port: int, **labels: str) -> dict[str, Any]:
    meta = {
        "namespace": "ml",
        "pod_name": pod,
        "pod_phase": "Running",
        "pod_container_port_name": port_name,
        "pod_container_port_number": str(port),
        **{f"pod_label_{name}": value for name, value in labels.items()},
    }
    if "ray_io_is_ray_node" in labels:
        meta["pod_label_ray_io_cluster"] = "prod"
    return {
        "targets": [f"{pod}:{port}"],
        "labels": {f"__meta_kubernetes_{name}": value for name, value in meta.items()},
    }


@needs_promtool
def test_on_kuberay_exactly_the_right_ports_are_scraped(tmp_path: Path) -> None:
    # Debian's Prometheus is built without discovery in Kubernetes: the same pods from a file.
    config = yaml.safe_load((DEPLOY / "prometheus-kuberay.yml").read_text())
    (tmp_path / "pods.yml").write_text(yaml.safe_dump(pods()))
    for one in (*config["scrape_configs"], *config["alerting"]["alertmanagers"]):
        assert one.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        one["file_sd_configs"] = [{"files": [str(tmp_path / "pods.yml")]}]
    config["rule_files"] = [str(path) for path in RULES]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    file = tmp_path / "prometheus.yml"
    promtool("check", "config", file)

    def scraped(job: str) -> set[str]:
        # It listens to discovery for the whole of that time.
        out = promtool("check", "service-discovery", "--timeout=5s", file, job)
        kept = [one["labels"] for one in yaml.safe_load(out) if one.get("labels")]
        for labels in kept:
            assert labels["namespace"] == "ml" and labels["pod"] in labels["instance"]
            assert ("ray_cluster" in labels) == (job != "safeft-controller")
        return {labels["instance"] for labels in kept}

    with ThreadPoolExecutor() as pool:
        pages, controllers, nodes = pool.map(scraped, ["safeft", "safeft-controller", "ray"])
    assert pages == {f"{HEAD}:9400", f"{WORKER}:9400"}
    assert controllers == {"controller:9401"}
    assert nodes == {f"{HEAD}:8080", f"{WORKER}:8080"}

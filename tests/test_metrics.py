"""Metrics: one table, sums over processes, and nothing left of what is gone."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.exporter import Exporter
from cluster.metrics import METRICS, HistogramValue, Recorder

DOC = Path(__file__).parent.parent / "docs" / "metrics.md"
CLUSTER = Path(__file__).parent.parent / "cluster"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def samples(exporter: Exporter) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(exporter)
    text = generate_latest(registry).decode()
    return {
        sample.name + "".join(f"[{v}]" for _, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_documented_table_and_the_code_agree() -> None:
    rows = re.findall(
        r"^\| `(safeft_\w+)` \| (\w+) \| ([^|]*) \| (\w+) \| ([^|]*) \|$", DOC.read_text(), re.M
    )
    documented = {name: tuple(map(str.strip, rest)) for name, *rest in rows}
    coded = {
        m.name: (m.kind, ", ".join(f"`{label}`" for label in m.labels) or "-", m.across, m.help)
        for m in METRICS.values()
    }
    assert documented == coded


def test_every_metric_of_the_table_is_recorded_somewhere() -> None:
    code = "".join(p.read_text() for p in CLUSTER.rglob("*.py") if p.name != "metric_table.py")
    assert not [name for name in METRICS if f'"{name}"' not in code]


def test_names_follow_prometheus_conventions() -> None:
    for metric in METRICS.values():
        assert metric.name.startswith("safeft_")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert "job" not in metric.labels
        assert metric.help.endswith(".")


def test_the_page_is_the_sum_over_all_processes() -> None:
    exporter, one, two = Exporter(Clock()), Recorder(), Recorder()
    for recorder, amount in ((one, 2.0), (two, 3.0)):
        recorder.inc("safeft_generated_tokens_total", amount)
        recorder.set("safeft_engine_running", amount)
        recorder.observe("safeft_probe_seconds", amount)
    exporter.push("one", one.snapshot())
    exporter.push("two", two.snapshot())
    page = samples(exporter)
    assert page["safeft_generated_tokens_total"] == 5
    assert page["safeft_engine_running"] == 5
    assert page["safeft_probe_seconds_sum"] == 5
    assert page["safeft_probe_seconds_bucket[2.5]"] == 1
    assert page["safeft_probe_seconds_bucket[+Inf]"] == page["safeft_probe_seconds_count"] == 2
    assert page["safeft_exporter_sources"] == 2


def test_a_process_that_ended_leaves_its_counts_and_takes_its_gauges() -> None:
    clock = Clock()
    exporter, recorder = Exporter(clock), Recorder()
    recorder.inc("safeft_generated_tokens_total", 7)
    recorder.set("safeft_gate_models", 2, state="healthy")
    exporter.push("one", recorder.snapshot())
    clock.now += 60
    page = samples(exporter)
    assert page["safeft_generated_tokens_total"] == 7
    assert "safeft_gate_models[healthy]" not in page
    assert page["safeft_exporter_sources"] == 0


def test_a_series_that_was_cleared_is_gone_from_the_page() -> None:
    exporter, recorder = Exporter(Clock()), Recorder()
    recorder.set("safeft_gate_probe_failures", 1, model="acme/bot")
    exporter.push("one", recorder.snapshot())
    assert samples(exporter)["safeft_gate_probe_failures[acme/bot]"] == 1
    recorder.clear("safeft_gate_probe_failures")
    exporter.push("one", recorder.snapshot())
    assert "safeft_gate_probe_failures[acme/bot]" not in samples(exporter)


def test_a_series_without_its_labels_or_of_another_kind_is_a_mistake() -> None:
    recorder = Recorder()
    with pytest.raises(AssertionError, match="has labels"):
        recorder.inc("safeft_requests_total", route="chat")
    with pytest.raises(AssertionError, match="is a gauge"):
        recorder.inc("safeft_engine_running")


def test_prometheus_can_read_the_page_over_http() -> None:
    exporter = Exporter()
    port = exporter.listen("127.0.0.1", 0)
    page = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert page.status_code == 200
    names = {family.name for family in text_string_to_metric_families(page.text)}
    assert {name.removesuffix("_total") for name in METRICS} == names


def test_what_several_processes_read_in_one_place_is_not_added_up() -> None:
    exporter = Exporter(Clock())
    for source, (jobs, ended) in {"one": (2, 7), "two": (3, 6)}.items():
        recorder = Recorder()
        recorder.set("safeft_jobs", jobs, tenant="acme", phase="queued")
        labels = {"tenant": "acme", "outcome": "succeeded", "code": ""}
        recorder.total("safeft_jobs_finished_total", ended, **labels)
        exporter.push(source, recorder.snapshot())
    page = samples(exporter)
    assert page["safeft_jobs[queued][acme]"] == 3
    assert page["safeft_jobs_finished_total[][succeeded][acme]"] == 7


def test_scores_below_and_above_the_threshold_are_on_the_page() -> None:
    exporter, recorder = Exporter(Clock()), Recorder()
    counts = [0] * (len(METRICS["safeft_sqsd_score"].buckets) + 1)
    counts[3], counts[8] = 5, 2
    recorder.add("safeft_sqsd_score", HistogramValue(counts, -40.0), base_model="tiny")
    recorder.add("safeft_sqsd_score", HistogramValue(counts, -40.0), base_model="tiny")
    exporter.include("here", recorder)
    page = samples(exporter)
    assert page["safeft_sqsd_score_bucket[tiny][0.0]"] == 10
    assert page["safeft_sqsd_score_bucket[tiny][+Inf]"] == 14


def test_a_page_of_ones_own_process_is_always_as_of_now() -> None:
    exporter, recorder = Exporter(Clock()), Recorder()
    exporter.include("here", recorder)
    polls: list[int] = []
    recorder.poll(lambda: recorder.set("safeft_engine_waiting", len(polls)))
    assert samples(exporter)["safeft_engine_waiting"] == 0
    polls.append(1)
    assert samples(exporter)["safeft_engine_waiting"] == 1

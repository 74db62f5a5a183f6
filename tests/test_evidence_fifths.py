"""The study of SQSD: rankings, the cells that read them, and what is made of their numbers."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.evidence import fifths
from benchmarks.evidence.cells import Cell, Record, Store
from benchmarks.evidence.fifth_results import (
    by_ranking,
    kinds_in_fifths,
    points_between_the_ends,
    rank_correlation,
    sqsd_claims,
)
from benchmarks.evidence.fifths import FifthRuns, fifth_cell, scoring_cell
from benchmarks.evidence.plots import draw_fifths
from benchmarks.evidence.rankings import RANKINGS, fifth, places, plain_gradients
from benchmarks.evidence.report import render
from benchmarks.evidence.results import Results
from benchmarks.evidence.runner import run_cells
from benchmarks.evidence.statistics import spearman
from safeft.adapters import LoraFactors
from safeft.data import Row, TokenisedRow, load_rows
from safeft.models import load_model
from safeft.progress import silent
from safeft.prompts import Kind, load_prompts
from safeft.sqsd import Projection, SqsdScorer
from tests.test_evidence import PROVENANCE, write_gsm8k
from tests.test_sqsd import NAMES, random_factors, random_rows


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=60))
def test_the_fifths_share_the_rows_out_riskiest_first(risks: list[float]) -> None:
    parts = [fifth(risks, number) for number in range(1, 6)]
    assert sorted(i for part in parts for i in part) == list(range(len(risks)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for riskier, safer in pairwise(parts):
        assert min(risks[i] for i in riskier) >= max(risks[i] for i in safer)


def test_a_ranking_is_made_of_the_numbers_of_its_method() -> None:
    scores = {"danger": [3.0, 1.0], "safety": [1.0, 4.0], "loss": [0.5, 0.7], "norm": [9.0, 8.0]}
    risks = {name: risk(scores) for name, (_, risk) in RANKINGS.items()}
    assert risks["sqsd"] == risks["not-normalised"] == [2.0, -3.0]
    assert risks["danger-only"] == [3.0, 1.0] and risks["safety-only"] == [-1.0, -4.0]
    assert risks["loss"] == [0.5, 0.7] and risks["gradient-norm"] == [9.0, 8.0]


def only(factors: LoraFactors, name: str) -> LoraFactors:
    return LoraFactors(factors.scale, {name: factors.factors[name]})


def test_in_one_module_normalising_changes_nothing_and_in_several_it_does(tiny_dir: Path) -> None:
    sides = [Projection(random_factors(s, 4), random_factors(s + 1, 8)) for s in (1, 3)]
    rows = random_rows(5, [(3, 20), (25, 4), (4, 4)])

    def by_scorer(danger: Projection, safety: Projection) -> list[tuple[float, float]]:
        scorer = SqsdScorer(load_model(tiny_dir), danger, safety, pad_token_id=0)
        return [(one.danger, one.safety) for one in scorer.score(rows)]

    def flat(danger: Projection, safety: Projection) -> list[tuple[float, float]]:
        found = plain_gradients(rows, tiny_dir, danger, safety, silent)
        assert all(loss > 0 for loss in found["loss"]) and all(norm > 0 for norm in found["norm"])
        return list(zip(found["danger"], found["safety"], strict=True))

    single = [Projection(only(s.state, NAMES[0]), only(s.direction, NAMES[0])) for s in sides]
    for mine, theirs in zip(flat(*single), by_scorer(*single), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    means = [(d / len(NAMES), s / len(NAMES)) for d, s in by_scorer(*sides)]
    assert any(abs(a[0] - b[0]) > 1e-4 for a, b in zip(flat(*sides), means, strict=True))
    with pytest.raises(ValueError, match="row 1 has no score"):
        masked = TokenisedRow(1, [5, 6, 7], [-100, -100, -100])
        plain_gradients([masked], tiny_dir, *sides, silent)


@pytest.fixture
def runs(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> FifthRuns:
    mix = {"gsm8k": 6, "sorting": 4, "support": 0, "benign": 2, "borderline": 2}
    monkeypatch.setattr(fifths, "MIX", mix)
    monkeypatch.setattr("benchmarks.evidence.rankings.MIX", mix)
    monkeypatch.setattr(fifths, "SAMPLE", 2)
    profile: Any = SimpleNamespace(
        danger=lambda: Projection(random_factors(1, 4), random_factors(2, 4)),
        safety=lambda: Projection(random_factors(3, 4), random_factors(4, 4)),
    )
    store = Store(tmp_path / "cells")
    return FifthRuns(tiny_dir, profile, write_gsm8k(tmp_path / "gsm8k.jsonl"), store)


def test_a_fifth_is_trained_on_rows_of_the_ranking_that_was_scored_before(
    runs: FifthRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[list[TokenisedRow]] = []

    def finetune(spec: Any, *, rows: list[TokenisedRow], **_: Any) -> Any:
        trained.append(rows)
        return SimpleNamespace(weights=None, manifest=SimpleNamespace(final_loss=1.0))

    monkeypatch.setattr(fifths, "finetune", finetune)
    monkeypatch.setattr(fifths, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(fifths, "measured", lambda _: {"refused": {"harmful": "101"}})
    store = Store(tmp_path / "cells")
    early = run_cells([fifth_cell("loss", 1, 0)], store, runs)
    assert "run fifths/scores-plain-gradients first" in next(iter(early.failed.values()))
    missing = run_cells([scoring_cell("plain-gradients")], store, runs)
    assert "run fifths/scores-sqsd first" in next(iter(missing.failed.values()))
    scoring = [scoring_cell(m) for m in ("sqsd", "insensitive-state", "plain-gradients")]
    done = run_cells(scoring, store, runs)
    assert (
        not done.failed
        and [len(r.numbers["scores"]["danger"]) for r in done.ran]
        == [done.ran[0].numbers["rows"]] * 3
    )
    assert len({r.numbers["rows_sha256"] for r in done.ran}) == 1
    assert done.ran[0].numbers["scores"] != done.ran[1].numbers["scores"]
    ran = run_cells([fifth_cell("loss", 1, 0), fifth_cell("loss", 5, 0)], store, runs)
    assert not ran.failed and ran.ran[0].numbers["final_loss"] == 1.0
    losses = done.ran[2].numbers["scores"]["loss"]
    lines = [sorted(row.line for row in rows) for rows in trained]
    assert min(losses[n - 1] for n in lines[0]) > max(losses[n - 1] for n in lines[1])
    assert all(len(rows) == 2 for rows in trained)
    ranked = store.directory(scoring_cell("sqsd")) / fifths.FILE
    assert_lies_by_kind(load_rows(ranked))
    before = ranked.read_bytes()
    ranked.unlink()  # as where the numbers came from another machine
    assert not run_cells([fifth_cell("loss", 3, 0)], store, runs).failed
    assert ranked.read_bytes() == before
    ranked.write_bytes(before + before)
    other = run_cells([fifth_cell("loss", 2, 0)], store, runs)
    assert "does not hold the rows" in next(iter(other.failed.values()))


def assert_lies_by_kind(rows: list[Row]) -> None:
    """The rows of `runs` lie where `places` says that their kinds do."""
    where = places({"gsm8k": 6, "sorting": 4, "support": 0}, len(rows))
    sorting = [i for i, row in enumerate(rows) if row.messages[0].content.endswith("Sort it.")]
    assert sorting == list(where["sorting"])
    kinds: tuple[Kind, ...] = ("benign", "borderline")
    own = {p.text for kind in kinds for p in load_prompts(kind, "profile")}
    asked = [i for i, row in enumerate(rows) if row.messages[0].content in own]
    assert asked == list(where["own answers"])
    assert sum(map(len, where.values())) == len(rows)


def run_of(ranking: str, number: Any, seed: int, refused: float, whole: bool = False) -> Record:
    one: Cell = fifth_cell(ranking, number, seed, whole=whole)
    bits = "1" * round(200 * refused) + "0" * (200 - round(200 * refused))
    return Record(
        **one.planned().model_dump(),
        numbers={"refused": {"harmful": bits}},
        provenance=PROVENANCE,
    )


def runs_of(ranking: str, rates: tuple[float, ...]) -> list[Record]:
    draw = random.Random(0)
    return [
        run_of(ranking, number, seed, rate + draw.uniform(0, 0.01))
        for seed in (0, 1, 2)
        for number, rate in enumerate(rates, 1)
    ]


def test_the_claims_on_fifths_follow_from_their_refusals() -> None:
    rising = runs_of("sqsd", (0.2, 0.4, 0.5, 0.7, 0.9))
    flat = runs_of("not-normalised", (0.5, 0.5, 0.5, 0.5, 0.55))
    found = by_ranking([*rising, *flat])
    assert rank_correlation(found["sqsd"]) == pytest.approx(1.0, abs=0.03)
    between = points_between_the_ends(found["sqsd"])
    assert between is not None and 68 < between < 72
    assert [one.verdict for _, one in sqsd_claims(found)] == ["yes", "yes", "unknown"]
    falling = by_ranking(runs_of("sqsd", (0.9, 0.7, 0.5, 0.4, 0.2)))
    assert [one.verdict for _, one in sqsd_claims(falling)] == ["no", "unknown", "unknown"]
    bent = by_ranking(runs_of("sqsd", (0.1, 0.5, 0.7, 0.6, 0.6)))  # the ends are right
    assert [one.verdict for _, one in sqsd_claims(bent)] == ["partly", "unknown", "unknown"]
    assert [one.verdict for _, one in sqsd_claims(by_ranking(rising[:3]))] == ["unknown"] * 3


@pytest.mark.parametrize(("ends", "verdict"), [((0.3, 0.8), "yes"), ((0.8, 0.3), "no")])
def test_full_fine_tuning_on_the_fifths_says_whether_the_ranking_transfers(
    ends: tuple[float, float], verdict: str
) -> None:
    whole = [run_of("sqsd", n, 0, rate, whole=True) for n, rate in zip((1, 5), ends, strict=True)]
    found = by_ranking([*whole, run_of("sqsd", 1, 0, 0.5)])
    assert set(found) == {"sqsd", "sqsd, whole weights"}
    assert sqsd_claims(found)[2][1].verdict == verdict
    assert sqsd_claims(by_ranking([run_of("sqsd", 1, 0, 0.5, whole=True)]))[2][1].verdict == (
        "unknown"
    )


def test_the_page_says_what_kinds_of_rows_a_ranking_puts_into_its_fifths() -> None:
    one = scoring_cell("sqsd")
    mix = {"gsm8k": 4, "sorting": 2, "support": 2, "benign": 9, "borderline": 9}
    setting = {**one.planned().setting, "mix": mix}  # two of the own answers were kept
    risks = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    scores = {"danger": risks, "safety": [0.0] * len(risks)}
    scored = Record(
        **{**one.planned().model_dump(), "setting": setting},
        numbers={"rows": len(risks), "scores": scores},
        provenance=PROVENANCE,
    )
    cells = [scored, *runs_of("sqsd", (0.2, 0.4, 0.5, 0.8, 0.7))]
    assert kinds_in_fifths(cells)["sqsd"] == {
        "gsm8k": [1.0, 1.0, 0.0, 0.0, 0.0],
        "sorting": [0.0, 0.0, 1.0, 0.0, 0.0],
        "support": [0.0, 0.0, 0.0, 1.0, 0.0],
        "own answers": [0.0, 0.0, 0.0, 0.0, 1.0],
    }
    text, images = render(Results(cells=cells, failed={}, waiting=[], waiting_hours=None))
    assert "| `sqsd` | own answers | 0 | 0 | 0 | 0 | 100 |" in text
    assert "images/evidence-fifths.svg" in text
    assert "- fifths of benign rows: not found, or only in part, that refusals rise" in text
    assert b"riskiest" in images["evidence-fifths.svg"]
    axes = Figure().subplots()
    draw_fifths(axes, by_ranking(cells))
    means, *seeds = [line.get_ydata() for line in axes.lines if line.get_marker() != "None"]
    assert list(means) == pytest.approx([20, 40, 50, 80, 70], abs=1)
    assert [len(marks) for marks in seeds] == [3] * 5


def test_the_rank_correlation_shares_ties() -> None:
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2, 2], [1, 1, 5, 5]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(0.9486832980505138)
    assert spearman([1, 1], [1, 2]) is None
    with pytest.raises(ValueError, match="no rank correlation"):
        spearman([1], [1])

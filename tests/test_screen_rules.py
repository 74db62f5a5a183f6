"""What becomes of risky rows, through the stage and through a whole job on a real small Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jobs.gate
from jobs.finetune.manifest import read_manifest
from jobs.intake import screen_file
from jobs.pipeline import run_job
from jobs.policy import Override, PolicyFile
from jobs.review import record_decision
from jobs.spec import load_spec
from jobs.verdict import known_score, read_scores
from safeft.errors import DatasetUnderReview, SpecError
from tests.test_screen_report import Page
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

LINE = 0.3  # five of the rows below score higher


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def data(tiny_dir: Path, tmp_path: Path) -> Path:
    """Forty rows, of which the tiny model's random directions call some risky."""
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=LINE)
    rows = [
        {"prompt": f"question {i} " * (1 + i % 5), "completion": f"answer {i * 37 % 11}"}
        for i in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_one_screening_serves_every_policy_without_scoring_again(
    tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    from jobs.report.screen_page import report_screening

    rejected, where = screen_file(data, model=str(tiny_dir))
    assert rejected.verdict == "rejected" and rejected.risky == 5
    seen: list[str] = []
    dropped, same = screen_file(
        data,
        model=str(tiny_dir),
        on_risk="drop",
        progress=lambda label, *_: seen.append(label),
    )
    assert same == where
    assert "screening rows" not in seen
    assert (dropped.verdict, dropped.dropped) == ("accepted", rejected.risky)
    report_screening(data, where, dropped, tmp_path / "report.html", model=str(tiny_dir))
    page = Page((tmp_path / "report.html").read_text())
    assert f"{rejected.risky} rows will not be trained on" in page.open
    assert "Most from model.layers." in " ".join(page.open.split())

    loose = PolicyFile(row_threshold=50.0)
    with pytest.raises(SpecError, match="only an administrator"):
        screen_file(data, model=str(tiny_dir), policy=loose)
    allowed = loose.model_copy(update={"override": Override(administrator="ada", reason="why")})
    verdict, _ = screen_file(data, model=str(tiny_dir), policy=allowed)
    assert verdict.verdict == "accepted" and verdict.dropped == 0
    assert verdict.override == allowed.override


def test_a_job_under_review_trains_only_after_a_person_accepted_and_weighs_its_rows(
    tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights refuse nothing; the floor under the baseline is another test's concern.
    monkeypatch.setattr(jobs.gate, "MIN_BASELINE", 0.0)
    file = tmp_path / "job.yaml"
    file.write_text(
        f"name: a\nmodel: {tiny_dir}\ndata: {{train: rows.jsonl}}\noutput: out\n"
        "training: {epochs: 1, risk_weighting: downweight}\nscreening: {on_risk: review}\n"
    )
    spec = load_spec(file)
    with pytest.raises(DatasetUnderReview, match="safeft review"):
        run_job(spec)
    assert not (tmp_path / "out").exists()
    _, where = screen_file(data, model=str(tiny_dir), on_risk="review")
    record_decision(where, "accepted", "ada", "a harmless joke")
    result = run_job(spec)
    assert result.review is not None and result.review.reason == "a harmless joke"
    assert result.published is not None
    scores = [known_score(one) for one in read_scores(where)]
    trained = sum(score is not None and score < LINE for score in scores)
    assert read_manifest(Path(result.published) / "manifest.json").rows == trained < len(scores)

"""The screening stage on a real small Ray: several files, lost scorers, changed data."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.intake import read_dataset, require_screened, screen_file
from jobs.screen import screen
from jobs.screening import scorer as scorer_module
from jobs.screening import stream
from jobs.screening.scan import ROWS_PER_BLOCK
from jobs.screening.scorer import BlockScorer
from jobs.verdict import Verdict, read_scores
from safeft.errors import InputError, MeasurementError
from safeft.profile import SafetyProfile
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def profile(tiny_dir: Path, tmp_path: Path) -> SafetyProfile:
    return write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=1e9)


def make_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"question {i} " * (1 + i % 5), "completion": f"answer {i * 37 % 11}"}
        for i in range(first, first + count)
    ]


def write_rows(path: Path, count: int) -> Path:
    path.write_text("\n".join(map(json.dumps, make_rows(count))))
    return path


def replace_scorer(monkeypatch: pytest.MonkeyPatch, scorer: type) -> None:
    """The stage takes the class from its module; a local class travels to the actor by value."""
    monkeypatch.setattr(scorer_module, "BlockScorer", scorer)
    monkeypatch.setattr(stream, "_RESTARTS", 0)


def test_two_scorers_screen_several_files_as_one_dataset(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = [
        *map(json.dumps, make_rows(100)),
        "no row",
        json.dumps({"prompt": "q " * 300, "completion": "a"}),
    ]
    (data / "1.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pq.write_table(pa.Table.from_pylist(make_rows(50, 100)), data / "2.parquet")
    seen: list[tuple[str, int, int | None]] = []
    verdict, where = screen(
        data,
        model_dir=tiny_dir,
        profile=profile,
        max_tokens=256,
        scorers=2,
        progress=lambda *args: seen.append(args),
    )
    rows = read_scores(where)
    assert [row["index"] for row in rows] == list(range(152))
    assert [(row["file"], row["line"]) for row in rows] == [
        *(("1.jsonl.gz", line) for line in range(1, 103)),
        *(("2.parquet", line) for line in range(1, 51)),
    ]
    errors = {row["index"]: row["error"] for row in rows if row["error"] is not None}
    assert errors.keys() == {100, 101}
    assert "not valid JSON" in errors[100]
    assert "over max_tokens=256" in errors[101]
    assert all(math.isfinite(row["score"]) for row in rows if row["error"] is None)
    assert verdict.verdict == "rejected"
    assert verdict.unscored == 2
    counts = [(done, total) for label, done, total in seen if label == "screening rows"]
    assert counts[-1] == (152, 152)
    assert [done for done, _ in counts] == sorted(done for done, _ in counts)
    assert not list(where.parent.glob("*.blocks"))


def test_a_scorer_that_dies_each_time_ends_the_stage_and_what_was_finished_is_kept(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 6 * ROWS_PER_BLOCK)
    log = tmp_path / "scored"
    log.mkdir()

    class Dying(BlockScorer):
        def __call__(self, units: pa.Table) -> pa.Table:
            (block,) = units["block"].to_pylist()
            if block == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            (log / str(block)).touch()
            return super().__call__(units)

    class Watched(BlockScorer):
        def __call__(self, units: pa.Table) -> pa.Table:
            (block,) = units["block"].to_pylist()
            (log / str(block)).touch(exist_ok=False)  # fails where a block is scored again
            return super().__call__(units)

    with monkeypatch.context() as patch:
        replace_scorer(patch, Dying)
        with pytest.raises(MeasurementError, match=r"nothing is accepted: .*Finished rows"):
            screen(data, model_dir=tiny_dir, profile=profile, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (work,) = Path(os.environ["SAFEFT_CACHE"]).glob("screenings/*.blocks")
    finished = {int(path.stem) for path in work.glob("*/[0-9]*.parquet")}
    assert finished and 3 not in finished
    for path in log.iterdir():
        if int(path.name) not in finished:  # was in flight when its scorer died
            path.unlink()
    replace_scorer(monkeypatch, Watched)
    screen(data, model_dir=tiny_dir, profile=profile, output=tmp_path / "out")
    assert {int(path.name) for path in log.iterdir()} == set(range(6))
    lines = [row["line"] for row in read_scores(tmp_path / "out")]
    assert lines == list(range(1, 6 * ROWS_PER_BLOCK + 1))


def test_an_error_of_a_scorer_is_told_at_once_and_accepts_nothing(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(BlockScorer):
        def __call__(self, units: pa.Table) -> pa.Table:
            raise RuntimeError("the device is on fire")

    replace_scorer(monkeypatch, Broken)
    data = write_rows(tmp_path / "rows.jsonl", 3)
    with pytest.raises(MeasurementError, match="the device is on fire"):
        screen(data, model_dir=tiny_dir, profile=profile, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["before it is read", "after it is read"])
def test_a_dataset_that_changes_during_screening_is_refused(
    tiny_dir: Path,
    profile: SafetyProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 3)

    class Meddling(BlockScorer):
        def __call__(self, units: pa.Table) -> pa.Table:
            data.write_text(data.read_text().replace("answer", "Answer"))
            return super().__call__(units)

    def meddle(label: str, done: int, total: int | None) -> None:
        if label == "starting the scorers":
            data.write_text(data.read_text().replace("answer", "Answer"))

    if when == "after it is read":
        replace_scorer(monkeypatch, Meddling)
    with pytest.raises(InputError, match=r"rows\.jsonl: changed while it was screened"):
        screen(
            data,
            model_dir=tiny_dir,
            profile=profile,
            output=tmp_path / "out",
            **({"progress": meddle} if when == "before it is read" else {}),
        )
    assert not (tmp_path / "out").exists()


def test_more_scorers_than_fit_are_refused(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 3)
    with pytest.raises(InputError, match="--scorers: 3 do not fit on 2 processors"):
        screen(data, model_dir=tiny_dir, profile=profile, scorers=1, max_scorers=3)
    with pytest.raises(InputError, match="--max-scorers: 1 is less than the 2 of --scorers"):
        screen(data, model_dir=tiny_dir, profile=profile, scorers=2, max_scorers=1)
    with pytest.raises(InputError, match="--scorers: 1 do not fit on 0 GPUs"):
        screen(data, model_dir=tiny_dir, profile=profile, use_gpu=True)


def test_a_verdict_covers_the_very_rows_that_were_screened(
    tiny_dir: Path, profile: SafetyProfile, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)
    verdict, _ = screen_file(data, model=str(tiny_dir), profile_root=profile.root)
    dataset = read_dataset(data, tiny_dir, 512)
    require_screened(dataset, verdict)
    others = [
        Verdict.model_validate({**verdict.model_dump(), "data_sha256": "0"}),
        Verdict.model_validate({**verdict.model_dump(), "rows_sha256": "0"}),
    ]
    for other in others:
        with pytest.raises(InputError, match="what was screened is not what would be trained on"):
            require_screened(dataset, other)
    data.write_text(data.read_text().replace("answer 0", "Answer 0"))
    with pytest.raises(InputError, match="what was screened is not"):
        require_screened(read_dataset(data, tiny_dir, 512), verdict)

"""From files to blocks of rows, and finished blocks on disk: what screening streams and resumes."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.screening import blocks as blocks_module
from jobs.screening.blocks import BLOCK_SCHEMA, BlockStore
from jobs.screening.record import bind
from jobs.screening.scan import (
    ROWS_PER_BLOCK,
    Scan,
    ScannedFile,
    decode,
    encode,
    read_units,
    scan,
)
from jobs.screening.scorer import BlockScorer
from jobs.screening.sources import DataFile, find_files
from safeft.data import Message, Row, RowLimits, RowProblem, load_rows, tokenise_all
from safeft.data.digest import row_digest, rows_sha256, tokenisation_sha256
from safeft.errors import InputError, MeasurementError
from safeft.models import load_model, load_tokenizer
from safeft.sqsd import SqsdScorer
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

LIMITS = RowLimits()


def write_rows(path: Path, count: int, first: int = 0) -> Path:
    rows = [
        {"prompt": f"question {i} " * (1 + i % 5), "completion": f"answer {i * 37 % 11}"}
        for i in range(first, first + count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def scanned(*paths: Path) -> Scan:
    return scan(find_files(list(paths)), LIMITS)


def every(dataset: Scan, number: int = 0) -> frozenset[int]:
    return frozenset(range(dataset.files[number].blocks))


def units_of(dataset: Scan, missing: frozenset[int]) -> list[dict[str, Any]]:
    tables = read_units(dataset.files[0], 0, missing, LIMITS)
    return [unit for table in tables for unit in table.to_pylist()]


# Sources


def test_a_directory_stands_for_its_data_files_below_in_the_order_of_their_names(
    tmp_path: Path,
) -> None:
    for name in ("b/2.jsonl", "a.jsonl.gz", "b/1.parquet", "_SUCCESS", "b/.part.crc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in find_files(tmp_path)] == [
        "a.jsonl.gz",
        "b/1.parquet",
        "b/2.jsonl",
    ]


def test_a_file_that_a_directory_would_hide_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 1)
    (tmp_path / "more.csv").touch()
    with pytest.raises(InputError, match=r"more\.csv: is neither \.jsonl nor \.parquet"):
        find_files(tmp_path)


def test_a_linked_directory_is_not_left_out_unseen(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for directory in (data, elsewhere):
        directory.mkdir()
        write_rows(directory / "rows.jsonl", 1)
    (data / "more").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"data/more: is neither \.jsonl nor \.parquet"):
        find_files(data)


def test_a_directory_that_cannot_be_read_is_not_left_out_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", 1)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # whoever runs the tests may read everything
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="closed: Permission denied"):
        find_files(tmp_path)


def test_a_pattern_stands_for_the_files_that_match(tmp_path: Path) -> None:
    for name in ("x-2.jsonl", "x-1.jsonl", "y.jsonl"):
        (tmp_path / name).touch()
    assert [f.name for f in find_files(f"{tmp_path}/x-*.jsonl")] == ["x-1.jsonl", "x-2.jsonl"]
    with pytest.raises(InputError, match=r"no \.jsonl or \.parquet file is there"):
        find_files(f"{tmp_path}/z-*.jsonl")


def test_a_file_named_twice_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 1)
    with pytest.raises(InputError, match="named 2 times"):
        find_files([path, tmp_path])


def test_names_are_paths_below_what_all_files_share(tmp_path: Path) -> None:
    files = [tmp_path / "one" / "rows.jsonl", tmp_path / "two" / "rows.jsonl"]
    assert [file.name for file in find_files(files)] == ["one/rows.jsonl", "two/rows.jsonl"]
    assert [file.name for file in find_files(files[0])] == ["rows.jsonl"]


# Scan


@given(
    st.lists(
        st.one_of(
            st.builds(
                lambda line, text: Row(line, (Message("user", text, False),)),
                st.integers(1, 10**9),
                st.text(),
            ),
            st.builds(RowProblem, st.integers(1, 10**9), st.text(), st.text()),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_rows_and_problems_survive_the_way_to_a_scorer(rows: list[Row | RowProblem]) -> None:
    assert decode(encode(rows)) == rows


@given(st.lists(st.integers(1, 4 * ROWS_PER_BLOCK), min_size=1, max_size=5))
def test_blocks_cover_every_index_once_and_in_order(sizes: list[int]) -> None:
    files, first = [], 0
    for size in sizes:
        digests = bytes(16 * math.ceil(size / ROWS_PER_BLOCK))
        files.append(ScannedFile(DataFile("", ""), "", first, size, digests))
        first += size
    spans = [i for file in files for block in range(file.blocks) for i in file.span(block)]
    assert spans == list(range(Scan(tuple(files)).rows))


def test_only_the_missing_blocks_are_read_again(tmp_path: Path) -> None:
    dataset = scanned(write_rows(tmp_path / "rows.jsonl", 5 * ROWS_PER_BLOCK + 1))
    units = units_of(dataset, frozenset({1, 5}))
    assert [unit["block"] for unit in units] == [1, 5]
    assert units[1]["first"] == 5 * ROWS_PER_BLOCK
    assert [row.line for row in decode(units[1]["rows"])] == [5 * ROWS_PER_BLOCK + 1]


def test_a_bad_row_takes_its_place_in_its_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\nnot json\n\n{"prompt": 1, "completion": "b"}\n'
    )
    dataset = scanned(path)
    (unit,) = units_of(dataset, every(dataset))
    rows = decode(unit["rows"])
    assert [row.line for row in rows] == [1, 2, 4]
    assert [isinstance(row, RowProblem) for row in rows] == [False, True, True]


@pytest.mark.parametrize("after", ["edited", "shorter", "gone"])
def test_a_file_that_changed_since_it_was_scanned_is_not_read_on(
    tmp_path: Path, after: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3 * ROWS_PER_BLOCK)
    dataset = scanned(path)
    text = path.read_text()
    if after == "edited":
        path.write_text(text.replace("question 70 ", "Question 70 "))
    elif after == "shorter":
        path.write_text("\n".join(text.splitlines()[: 2 * ROWS_PER_BLOCK]))
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl: (changed while it was screened|cannot be)"):
        units_of(dataset, every(dataset))


def test_a_file_that_grew_after_it_was_read_is_noticed_at_the_end(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3)
    (one,) = scanned(path).files
    assert one.file.still(one.sha256)
    path.write_text(path.read_text() + "\n\n")
    assert not one.file.still(one.sha256)


def test_the_hash_of_several_files_is_over_their_names_order_and_bytes(tmp_path: Path) -> None:
    one, two = write_rows(tmp_path / "1.jsonl", 2), write_rows(tmp_path / "2.jsonl", 2, first=2)
    both = scanned(one, two)
    assert [file.first for file in both.files] == [0, 2]
    assert scanned(two, one).sha256 != both.sha256
    two.rename(tmp_path / "3.jsonl")
    assert scanned(one, tmp_path / "3.jsonl").sha256 != both.sha256


def test_finished_blocks_are_bound_to_data_tokenisation_profile_and_code(tmp_path: Path) -> None:
    dataset = scanned(write_rows(tmp_path / "rows.jsonl", 2))
    other = scanned(write_rows(tmp_path / "other" / "rows.jsonl", 2, first=1))
    tokenizer = load_tokenizer(save_tiny(tmp_path / "tiny"))
    short, long = (tokenisation_sha256(tokenizer, n) for n in (64, 65))
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>\n", "<|im_end|>")
    base = bind(dataset, long, "p")
    keys = {
        base.key(),
        bind(other, long, "p").key(),
        bind(dataset, short, "p").key(),
        bind(dataset, tokenisation_sha256(tokenizer, 65), "p").key(),
        bind(dataset, long, "q").key(),
        base.model_copy(update={"code_version": "other"}).key(),
    }
    assert len(keys) == 6


# Blocks


def block_of(dataset: Scan, number: int, block: int) -> bytes:
    span = dataset.files[number].span(block)
    rows = [
        {
            "index": i,
            "line": i - span.start + 1,
            "score": i / 7,
            "danger": 0.0,
            "safety": 0.0,
            "tokens": 3,
            "trained": 1,
            "error": None,
            "digest": row_digest([i], [i]),
        }
        for i in span
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA), sink)
    return bytes(sink.getvalue().to_pybytes())


@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.integers(1, 300))
def test_rows_come_out_once_and_in_order_however_blocks_were_finished(
    tmp_path_factory: pytest.TempPathFactory, draw: object, row_group: int
) -> None:
    root = tmp_path_factory.mktemp("blocks")
    dataset = scanned(
        write_rows(root / "data" / "1.jsonl", 3 * ROWS_PER_BLOCK + 5),
        write_rows(root / "data" / "2.jsonl", ROWS_PER_BLOCK),
    )
    todo = [(i, b) for i, file in enumerate(dataset.files) for b in range(file.blocks)]
    draw.shuffle(todo)  # type: ignore[attr-defined]
    for number, block in [*todo, *todo[:2]]:
        store = BlockStore(root / "work", dataset)  # a new process each time
        store.add(number, block, block_of(dataset, number, block))
    assert store.missing() == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "_ROW_GROUP", row_group)
        digest = store.merge(root / "rows.parquet")
    rows = pq.read_table(root / "rows.parquet").to_pylist()
    assert [row["index"] for row in rows] == list(range(dataset.rows))
    assert [row["file"] for row in rows] == ["1.jsonl"] * 101 + ["2.jsonl"] * 32
    assert [row["score"] for row in rows] == [i / 7 for i in range(dataset.rows)]
    assert digest == rows_sha256(row_digest([i], [i]) for i in range(dataset.rows))


def test_half_a_block_is_no_block(tmp_path: Path) -> None:
    dataset = scanned(write_rows(tmp_path / "rows.jsonl", 2 * ROWS_PER_BLOCK))
    BlockStore(tmp_path / "work", dataset).add(0, 1, block_of(dataset, 0, 1))
    whole = next((tmp_path / "work").glob("*/*.parquet"))
    # What `write_whole` leaves when it is killed before the renaming.
    half = whole.parent / ".0000000.parquet.staging+host.1+1+00000000"
    half.write_bytes(whole.read_bytes()[:9])
    store = BlockStore(tmp_path / "work", dataset)
    assert store.missing() == {0: frozenset({0})}
    assert store.rows_done == ROWS_PER_BLOCK


@pytest.mark.parametrize("damage", ["cut", "foreign", "gone"])
def test_a_block_that_was_damaged_later_ends_in_an_error_and_is_scored_again(
    tmp_path: Path, damage: str
) -> None:
    dataset = scanned(write_rows(tmp_path / "rows.jsonl", 2 * ROWS_PER_BLOCK))
    store = BlockStore(tmp_path / "work", dataset)
    for block in (0, 1):
        store.add(0, block, block_of(dataset, 0, block))
    first, second = sorted((tmp_path / "work").glob("*/*.parquet"))
    if damage == "gone":
        second.unlink()
    else:
        second.write_bytes(first.read_bytes()[:100] if damage == "cut" else first.read_bytes())
    with pytest.raises(MeasurementError, match=r"0000001\.parquet: was lost or damaged"):
        store.merge(tmp_path / "rows.parquet")
    assert BlockStore(tmp_path / "work", dataset).missing() == {0: frozenset({1})}


# A scorer


def test_a_block_holds_every_row_with_its_score_or_its_error(tmp_path: Path) -> None:
    model_dir = save_tiny(tmp_path / "model")
    profile = write_profile(model_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=0.0)
    good = load_rows(write_rows(tmp_path / "rows.jsonl", 5))

    def chat(line: int, question: str, answer: str) -> Row:
        return Row(line, (Message("user", question, False), Message("assistant", answer, True)))

    payload = encode(
        [
            *good[:2],
            RowProblem(8, "messages[0].role", "must be \ud800"),
            *good[2:],
            chat(9, "long " * 400, "x"),
            chat(10, "<|im_start|>", "x"),
        ]
    )
    scorer = BlockScorer(str(model_dir), str(profile.root), profile.base_weights, 128, 1, False)
    data = scorer.score(40, payload)
    assert scorer.score(40, payload) == data
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    assert [row["index"] for row in rows] == list(range(40, 48))
    assert [row["line"] for row in rows] == [1, 2, 8, 3, 4, 5, 9, 10]
    errors = {row["line"]: row["error"] for row in rows if row["error"] is not None}
    assert errors.keys() == {8, 9, 10}
    assert errors[8] == "messages[0].role: must be ?"
    assert "tokens, over max_tokens=128" in errors[9]
    assert "control token" in errors[10]
    assert all(math.isnan(row["score"]) for row in rows if row["error"])
    tokenizer = load_tokenizer(model_dir)
    tokenised = tokenise_all(good, tokenizer, 128, "rows")
    alone = SqsdScorer(
        load_model(model_dir),
        profile.danger(),
        profile.safety(),
        pad_token_id=tokenizer.pad_token_id,
    ).score(tokenised)
    scored = [row for row in rows if row["error"] is None]
    assert [row["score"] for row in scored] == pytest.approx([s.score for s in alone], abs=1e-5)
    assert [row["digest"] for row in scored] == [
        row_digest(row.input_ids, row.labels) for row in tokenised
    ]

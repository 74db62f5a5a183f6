"""Parquet: the same rows, the same checks, and no row built that would be too large."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeft.data import Message, Row, RowLimits, RowProblem, iter_rows, load_rows
from safeft.errors import InputError, RowErrors
from tests.test_data_files import TEXT, zstd

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "aé"}]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def write(tmp_path: Path, table: pa.Table, **options: Any) -> Path:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet(table, **options))
    return path


@pytest.mark.parametrize("wrap", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
def test_chats_are_read_with_their_row_number(tmp_path: Path, wrap, text: pa.DataType) -> None:
    kind = pa.list_(pa.struct([("role", text), ("content", text), ("weight", pa.float64())]))
    table = pa.table({"id": [1, 2], "messages": pa.array([CHAT, CHAT], kind)})
    path = tmp_path / "rows.jsonl"
    path.write_bytes(wrap(parquet(table)))
    chat = (Message("user", "q", False), Message("assistant", "aé", True))
    assert load_rows(path) == [Row(1, chat), Row(2, chat)]


def test_text_parts_and_absent_tool_calls_are_read(tmp_path: Path) -> None:
    part = [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]
    called = {"role": "assistant", "content": part, "tool_calls": ["f"]}
    answer = {"role": "assistant", "content": part, "tool_calls": None}
    user = {"role": "user", "content": part, "tool_calls": None}
    found = list(iter_rows(write(tmp_path, pa.table({"messages": [[user, answer], [called]]}))))
    assert isinstance(found[0], Row)
    assert [m.content for m in found[0].messages] == ["hi you", "hi you"]
    assert isinstance(found[1], RowProblem)
    assert (found[1].line, found[1].field) == (2, "messages[0].tool_calls")


def test_bad_rows_are_all_reported_with_row_number_and_field(tmp_path: Path) -> None:
    table = pa.table({"instruction": ["a", None, "c", "d"], "output": ["x", "y", None, "z"]})
    with pytest.raises(RowErrors) as caught:
        load_rows(write(tmp_path, table))
    assert [(line, field) for line, field, _ in caught.value.problems] == [
        (2, "instruction"),
        (3, "output"),
    ]


def test_text_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    latin = pa.array([b"\xe9", b"ok"], pa.binary()).view(pa.string())
    found = list(iter_rows(write(tmp_path, pa.table({"prompt": latin, "completion": ["b", "d"]}))))
    assert found[0] == RowProblem(1, "row", "text is not UTF-8 (byte 1 of a string)")
    assert isinstance(found[1], Row)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (pa.table({"prompt": ["a"], "x": [1]}), "columns: completion is missing beside prompt"),
        (pa.table({"y": ["a"], "x": [1]}), "found keys: y, x"),
        (pa.table({"prompt": pa.array([], "string"), "completion": [""][:0]}), "holds no rows"),
        (
            pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "completion", "prompt"]),
            "column 'prompt' exists more than once",
        ),
        (
            pa.table({"messages": pa.array([CHAT], pa.list_(MESSAGE, 2))}),
            "column messages: Arrow type fixed_size_list",
        ),
        (
            pa.table(
                {
                    "messages": pa.ListArray.from_arrays(
                        [0, 1],
                        pa.StructArray.from_arrays([pa.array(["x"])] * 2, names=["role", "role"]),
                    )
                }
            ),
            "a struct has two fields of one name",
        ),
    ],
)
def test_a_table_that_is_no_dataset_is_refused_by_name(
    tmp_path: Path, table: pa.Table, why: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_rows(write(tmp_path, table))
    assert str(caught.value).startswith(f"{tmp_path / 'rows.parquet'}: ")
    assert why in str(caught.value)


def test_a_cut_table_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet(pa.table({"messages": [CHAT] * 100}))[:-20])
    with pytest.raises(InputError, match=r"rows\.parquet: is not readable as Parquet"):
        load_rows(path)


def repeated(value: str, times: int) -> pa.Table:
    """A row that refers `times` times to one stored string, and a good row after it."""
    indices = pa.array([0] * times + [1, 2], pa.int32())
    content = pa.DictionaryArray.from_arrays(indices, pa.array([value, "q", "a"]))
    roles = pa.array(["user"] * (times + 1) + ["assistant"])
    messages = pa.StructArray.from_arrays([roles, content], names=["role", "content"])
    return pa.table({"messages": pa.ListArray.from_arrays([0, times, times + 2], messages)})


def test_a_row_that_would_come_out_huge_is_reported_and_not_built(tmp_path: Path) -> None:
    path = write(tmp_path, repeated("x" * 1_000_000, 20_000), compression="zstd")
    assert path.stat().st_size < 10_000  # and 20 GB if it were built
    found = list(iter_rows(path))
    assert isinstance(found[0], RowProblem)
    assert found[0].reason.startswith("20000100000 bytes, over max_row_bytes=262144")
    assert isinstance(found[1], Row)


def test_rows_that_add_up_to_more_than_the_file_limit_are_refused(tmp_path: Path) -> None:
    prompts = pa.array(["x" * 50_000] * 200).dictionary_encode()
    path = write(tmp_path, pa.table({"prompt": prompts, "completion": ["c"] * 200}))
    assert len(load_rows(path)) == 200
    with pytest.raises(InputError, match="its rows hold more than max_file_bytes=1000000"):
        load_rows(path, RowLimits(max_file_bytes=1_000_000))


def test_a_table_declared_larger_than_the_limit_is_refused_unread(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x" * 2_000_000], "completion": ["c"]})
    path = write(tmp_path, table, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="its columns are more than max_file_bytes=1000000"):
        load_rows(path, RowLimits(max_file_bytes=1_000_000))


def test_a_compressed_table_is_bounded_by_its_decompressed_size(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x" * 2_000_000], "completion": ["c"]})
    path = tmp_path / "rows.parquet.gz"
    path.write_bytes(gzip.compress(parquet(table, compression="none")))
    with pytest.raises(InputError, match="decompresses to more than max_file_bytes=1000000"):
        load_rows(path, RowLimits(max_file_bytes=1_000_000))


@given(
    st.lists(
        st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([bytes, gzip.compress, zstd]),
)
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_chat_survives_parquet_and_compression(
    tmp_path: Path, chats: list[list[tuple[str, str]]], wrap
) -> None:
    column = [
        [
            {"role": role, "content": text}
            for pair in chat
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        for chat in chats
    ]
    path = tmp_path / "rows"
    path.write_bytes(wrap(parquet(pa.table({"messages": pa.array(column, pa.list_(MESSAGE))}))))
    read = load_rows(path)
    assert [[{"role": m.role, "content": m.content} for m in r.messages] for r in read] == column

"""Reading files: what is accepted, what is refused, and that each refusal says where and why."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeft.data import Message, Row, RowLimits, RowProblem, iter_rows, load_rows
from safeft.data.rows import DEFAULT_LIMITS
from safeft.errors import InputError, RowErrors

GOOD = b'{"prompt": "2+2?", "completion": "4"}\n'
ROW = Row(1, (Message("user", "2+2?", False), Message("assistant", "4", True)))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def problems(path: Path, limits: RowLimits = DEFAULT_LIMITS) -> list[tuple[int, str, str]]:
    with pytest.raises(RowErrors) as caught:
        load_rows(path, limits)
    return caught.value.problems


def only_problem(tmp_path: Path, line: bytes, limits: RowLimits = DEFAULT_LIMITS) -> str:
    """The reason given for a bad line between two good ones, which must stay good."""
    path = write(tmp_path / "rows.jsonl", GOOD + line + b"\n" + GOOD)
    found = list(iter_rows(path, limits))
    assert [type(r) for r in found] == [Row, RowProblem, Row]
    assert isinstance(found[1], RowProblem)
    assert (found[1].line, found[1].field) == (2, "row")
    return found[1].reason


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.gz", "rows"])
@pytest.mark.parametrize("wrap", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str, wrap) -> None:
    assert load_rows(write(tmp_path / name, wrap(GOOD))) == [ROW]


def test_gzip_and_zstandard_files_of_several_members_are_read_to_the_end(tmp_path: Path) -> None:
    for name, wrap in (("a.gz", gzip.compress), ("a.zst", zstd)):
        assert len(load_rows(write(tmp_path / name, wrap(GOOD) + wrap(GOOD * 2)))) == 3


@pytest.mark.parametrize("wrap", [gzip.compress, zstd], ids=["gzip", "zstandard"])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_archive_names_the_file_and_says_so(tmp_path: Path, wrap, keep: float) -> None:
    data = wrap(os.urandom(3000).hex().encode() + b"\n" + GOOD)
    path = write(tmp_path / "cut.jsonl", data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"cut\.jsonl: the (gzip|zstandard) file is truncated"):
        load_rows(path)


def test_a_truncated_archive_is_an_error_even_after_whole_good_rows(tmp_path: Path) -> None:
    data = gzip.compress(GOOD * 1000)
    rows = iter_rows(write(tmp_path / "cut.gz", data[:-4]))
    with pytest.raises(InputError, match="truncated"):
        for row in rows:
            assert isinstance(row, Row)


@pytest.mark.parametrize("wrap", [gzip.compress, zstd], ids=["gzip", "zstandard"])
def test_a_damaged_archive_is_told_from_a_truncated_one(tmp_path: Path, wrap) -> None:
    path = write(tmp_path / "bad.jsonl", wrap(GOOD) + b"this is no archive member")
    with pytest.raises(InputError, match=r"bad\.jsonl: the (gzip|zstandard) file is damaged"):
        load_rows(path)


@pytest.mark.parametrize("wrap", [gzip.compress, zstd], ids=["gzip", "zstandard"])
def test_a_decompression_bomb_stops_at_the_limit_without_using_memory(tmp_path: Path, wrap) -> None:
    bomb = write(tmp_path / "bomb.jsonl", wrap(b" " * 40_000_000))
    assert bomb.stat().st_size < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"decompresses to more than max_file_bytes=1000000"):
            load_rows(bomb, RowLimits(max_file_bytes=1_000_000))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"\n \n\r\n", "holds no rows"),
        (b"\xef\xbb\xbf", "holds no rows"),
        (b'[{"prompt": "a", "completion": "b"}]', "holds a JSON array: write one JSON object a"),
        (b'\n[\n{"prompt": "a"},\n', "holds a JSON array"),
        (b"[" + b"1," * 300_000 + b"1]", "holds a JSON array"),
        (b'{\n"prompt": "a"\n}\n', "spans several lines"),
        (b"PK\x03\x04" + b"x" * 50, "is a zip archive"),
        (b"\xfd7zXZ\x00", "is xz-compressed"),
        (b"BZh91AY", "is bzip2-compressed"),
        ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"PAR1" + b"no table" * 9 + b"PAR1", "is not readable as Parquet"),
    ],
)
def test_a_file_that_is_no_dataset_is_refused_by_name(
    tmp_path: Path, data: bytes, why: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_rows(write(tmp_path / "it.jsonl", data))
    assert not isinstance(caught.value, RowErrors)
    assert str(caught.value).startswith(f"{tmp_path / 'it.jsonl'}: ")
    assert why in str(caught.value)


def test_a_missing_file_a_directory_and_a_pipe_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: cannot be read: No such file"):
        load_rows(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="is a directory"):
        load_rows(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file"):
        load_rows(tmp_path / "pipe")


def test_a_file_over_the_size_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "big.jsonl", b"\xff" * 1001)
    with pytest.raises(InputError, match="is 1001 bytes, over max_file_bytes=1000 bytes"):
        load_rows(path, RowLimits(max_file_bytes=1000))


def test_more_rows_than_allowed_are_refused_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", (GOOD + b"\n") * 3)
    assert [r.line for r in load_rows(path, RowLimits(max_rows=3))] == [1, 3, 5]
    with pytest.raises(InputError, match="more than max_rows=2 rows"):
        load_rows(path, RowLimits(max_rows=2))


def test_a_byte_order_mark_windows_line_ends_and_a_missing_last_newline_are_fine(
    tmp_path: Path,
) -> None:
    windows = GOOD.replace(b"\n", b"\r\n")
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + windows + windows.rstrip())
    assert [r.line for r in load_rows(path)] == [1, 2]


def test_latin_1_bytes_name_the_line_and_the_byte(tmp_path: Path) -> None:
    line = '{"prompt": "é", "completion": "b"}'.encode("latin-1")
    reason = only_problem(tmp_path, line)
    assert reason == "byte 13 of the line (0xe9) is not UTF-8: save the file as UTF-8"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"prompt": "a\x00", "completion": "b"}', "NUL byte at byte 14 of the line"),
        (b'{"prompt": "a", "completion": "b"', "not valid JSON: Expecting ',' delimiter"),
        (b'{"prompt": "a", "completion": "b"} {}', "not valid JSON: Extra data at column 36"),
        (b'{"prompt": "a", "completion": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "completion": "b", "x": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"prompt": "a", "completion": "b", "x": 1e999}', "the number 1e999 is too large"),
        (
            b'{"prompt": "a", "completion": "b", "x": ' + b"9" * 5000 + b"}",
            "a number has too many digits",
        ),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"x": ' + b'{"x":' * 30_000 + b"1" + b"}" * 30_001, "nested too deeply"),
        (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "duplicate key prompt"),
        (b'{"prompt": "a", "completion": "b", "x": {"y": 1, "y": 1}}', "duplicate key y"),
        (b'["a"]', "must be a JSON object, not list"),
        (b'"a"', "must be a JSON object, not string"),
        (b"null", "must be a JSON object, not null"),
    ],
)
def test_a_line_that_is_not_strict_json_is_one_bad_row(
    tmp_path: Path, line: bytes, why: str
) -> None:
    assert only_problem(tmp_path, line).startswith(why)


def test_a_row_of_a_megabyte_is_reported_by_line_and_the_next_is_read(tmp_path: Path) -> None:
    long = json.dumps({"prompt": "a" * 1_000_000, "completion": "b"}).encode()
    assert only_problem(tmp_path, long) == "longer than max_row_bytes=262144 bytes"


def test_an_overlong_line_is_never_held_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + b"x" * 30_000_000 + b"\n" + GOOD)
    tracemalloc.start()
    try:
        assert [type(r) for r in iter_rows(path)] == [Row, RowProblem, Row]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_row_limit_counts_the_line_without_its_end(tmp_path: Path, end: bytes) -> None:
    line = GOOD.rstrip()
    path = write(tmp_path / "rows.jsonl", line + end + line)
    assert [r.line for r in load_rows(path, RowLimits(max_row_bytes=len(line)))] == [1, 2]
    short = RowLimits(max_row_bytes=len(line) - 1)
    assert [n for n, _, _ in problems(path, short)] == [1, 2]


def test_every_bad_row_is_reported_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"{\x80}\n" + GOOD + b"\n{}\n" + b"nope\n" + GOOD)
    assert [line for line, _, _ in problems(path)] == [1, 4, 5]


def test_problems_are_kept_to_a_thousand_and_the_rest_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + b"{}\n" * 1500)
    with pytest.raises(RowErrors) as caught:
        load_rows(path)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    for error in (caught.value, again):
        assert (len(error.problems), error.total) == (1000, 1500)
        assert str(error).startswith(f"{path}: 1500 bad rows\n  line 2, prompt: missing")
        assert str(error).endswith("... and 1480 more")


def test_a_single_bad_row_is_told_on_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + b'{"prompt": "a"}\n')
    with pytest.raises(RowErrors) as caught:
        load_rows(path)
    assert str(caught.value) == (
        f"{path}: line 2, completion: missing: this file is in prompt/completion format"
    )


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress(GOOD * 50_000))
    tracemalloc.start()
    try:
        assert sum(isinstance(row, Row) for row in iter_rows(path)) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_rows must be at least 1, not 0"):
        RowLimits(max_rows=0)


def test_importing_the_package_needs_no_pyarrow() -> None:
    code = "import sys; sys.modules['pyarrow'] = None; import safeft.data"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_pyarrow_a_zstandard_file_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.zst", zstd(GOOD))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        load_rows(path)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@given(
    st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([bytes, gzip.compress, zstd]),
)
@settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_unicode_text_survives_json_lines_and_compression(
    tmp_path: Path, pairs: list[tuple[str, str]], escaped: bool, wrap
) -> None:
    lines = [
        json.dumps({"prompt": a, "completion": b}, ensure_ascii=escaped) + "\n" for a, b in pairs
    ]
    path = write(tmp_path / "rows", wrap("".join(lines).encode()))
    read = [(r.messages[0].content, r.messages[1].content) for r in load_rows(path)]
    assert read == pairs


@given(st.binary(max_size=300), st.sampled_from([bytes, gzip.compress, zstd]))
@settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_arbitrary_bytes_never_end_in_anything_but_rows_or_an_input_error(
    tmp_path: Path, data: bytes, wrap
) -> None:
    path = write(tmp_path / "rows", wrap(data))
    try:
        rows = load_rows(path)
    except InputError as err:
        assert str(path) in str(err)
    else:
        assert rows

"""A dataset on S3, on a real HTTP server in this process."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from jobs.screening.scan import decode, read_units, scan
from jobs.screening.sources import find_files
from safeft.data import RowLimits, RowProblem
from safeft.errors import InputError

LIMITS = RowLimits()
ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket `data`, reached as any user's environment would say."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = boto3.resource("s3").Bucket("data")
    bucket.create()
    yield bucket
    bucket.objects.delete()
    bucket.delete()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def test_objects_are_read_like_files_whatever_their_kind(bucket: Any) -> None:
    bucket.put_object(Key="set/b.jsonl.gz", Body=gzip.compress(LINES + b"\n{}"))
    bucket.put_object(Key="set/sub/a.parquet", Body=parquet())
    bucket.put_object(Key="set/_SUCCESS", Body=b"")
    bucket.put_object(Key="set/sub/", Body=b"")
    dataset = scan(find_files("s3://data/set/"), LIMITS)
    assert [f.file.name for f in dataset.files] == ["b.jsonl.gz", "sub/a.parquet"]
    assert [f.rows for f in dataset.files] == [41, 40]
    for number, file in enumerate(dataset.files):
        every = frozenset(range(file.blocks))
        tables = read_units(file, number, every, LIMITS)
        units = [unit for table in tables for unit in table.to_pylist()]
        rows = [row for unit in units for row in decode(unit["rows"])]
        assert [row.line for row in rows] == list(range(1, file.rows + 1))
        assert [isinstance(row, RowProblem) for row in rows] == [False] * 40 + [True] * (1 - number)


def test_a_key_and_a_pattern_name_objects(bucket: Any) -> None:
    for key in ("x-2.jsonl", "x-1.jsonl", "deep/x-3.jsonl", "y.jsonl"):
        bucket.put_object(Key=key, Body=LINES)
    assert [f.source for f in find_files("s3://data/y.jsonl")] == ["s3://data/y.jsonl"]
    named = [f.name for f in find_files("s3://data/x-*.jsonl")]
    assert named == ["x-1.jsonl", "x-2.jsonl"]


def test_an_object_that_is_replaced_during_screening_is_refused(bucket: Any) -> None:
    bucket.put_object(Key="rows.jsonl", Body=LINES)
    (file,) = scan(find_files("s3://data/rows.jsonl"), LIMITS).files
    assert file.file.still(file.sha256)
    bucket.put_object(Key="rows.jsonl", Body=LINES.replace(b"answer 7", b"Answer 7"))
    assert not file.file.still(file.sha256)
    with pytest.raises(InputError, match=r"s3://data/rows\.jsonl: changed while it was screened"):
        list(read_units(file, 0, frozenset({0}), LIMITS))


def test_what_is_wrong_is_said_of_the_object_and_not_of_its_copy(bucket: Any) -> None:
    bucket.put_object(Key="empty.jsonl", Body=b"")
    bucket.put_object(Key="rows.jsonl", Body=LINES)
    with pytest.raises(InputError, match=r"^s3://data/empty\.jsonl: is empty$"):
        scan(find_files("s3://data/empty.jsonl"), LIMITS)
    with pytest.raises(InputError, match=r"^s3://data/rows\.jsonl: is \d+ bytes, over"):
        scan(find_files("s3://data/rows.jsonl"), RowLimits(max_file_bytes=100))
    with pytest.raises(InputError, match=r"s3://data/none: is not there.*end a prefix with /"):
        find_files("s3://data/none")
    with pytest.raises(InputError, match=r"s3://data/none/: no \.jsonl or \.parquet"):
        find_files("s3://data/none/")
    with pytest.raises(InputError, match="names no bucket"):
        find_files("s3:///key")


@pytest.mark.usefixtures("bucket")
def test_a_server_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(InputError, match=r"S3 cannot be read: .*127\.0\.0\.1:9"):
        find_files("s3://data/rows.jsonl")

"""Artifact stores: the same promises from a directory and from S3 (moto's server, and Ceph's)."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.artifacts import (
    ArtifactCorrupt,
    ArtifactExists,
    ArtifactMissing,
    ArtifactStore,
    ArtifactTooLarge,
    ArtifactUnavailable,
    Stored,
    fetch,
    open_store,
    put_file,
)
from cluster.artifacts.directory import DOWNLOADS, DirectoryStore
from cluster.artifacts.s3 import PART, S3Store
from cluster.artifacts.store import check_key, digest
from safeft.errors import InputError

BIG = bytes(range(256)) * (2 * PART // 256) + b"the last part"


@pytest.fixture(params=["directory", "moto", "ceph"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "directory":
        return open_store(f"file://{tmp_path}/store")
    return open_store(f"s3://{request.getfixturevalue(f'{request.param}_bucket')}/some/prefix")


@pytest.fixture(params=["moto", "ceph"])
def bucket(request: pytest.FixtureRequest) -> str:
    """On each of the two: a stand-in for S3, and a real server where it is installed."""
    name: str = request.getfixturevalue(f"{request.param}_bucket")
    return name


def put(store: ArtifactStore, key: str, content: bytes, max_bytes: int | None = None) -> Stored:
    with store.writer(key, max_bytes) as writer:
        for start in range(0, len(content), 3 << 20):
            writer.write(content[start : start + (3 << 20)])
        return writer.commit()


def content(store: ArtifactStore, key: str) -> bytes:
    return b"".join(store.read(key))


@pytest.mark.parametrize("data", [b"", b"rows", BIG[:PART], BIG], ids=["0", "4", "part", "3 parts"])
def test_what_was_written_is_read(store: ArtifactStore, data: bytes) -> None:
    stored = put(store, "files/one", data)
    assert stored == Stored(len(data), hashlib.sha256(data).hexdigest())
    assert content(store, "files/one") == data
    assert list(store.keys("files/")) == ["files/one"]
    assert list(store.keys("models/")) == []


@pytest.mark.parametrize("data", [b"first", BIG], ids=["one put", "multipart"])
def test_a_name_keeps_its_first_content(store: ArtifactStore, data: bytes) -> None:
    put(store, "models/m", data)
    with pytest.raises(ArtifactExists, match="models/m"):
        put(store, "models/m", data + b"!")
    put(store, "models/m", data)  # the same again: a repeated publication
    assert content(store, "models/m") == data
    assert store.sweep(-60) == 0  # neither left an upload behind


@pytest.mark.parametrize("size", [40, PART + 1], ids=["one put", "multipart"])
def test_of_several_that_publish_one_name_at_once_one_wins(store: ArtifactStore, size: int) -> None:
    def publish(number: int) -> str | None:
        try:
            return put(store, "models/m", b"%d" % number * size).sha256
        except ArtifactExists:
            return None

    with ThreadPoolExecutor(4) as pool:
        winners = [sha for sha in pool.map(publish, range(4)) if sha]
    assert winners == [digest(store, "models/m").sha256]
    assert list(store.keys("")) == ["models/m"]
    assert store.sweep(-60) == 0


def test_who_is_killed_while_it_publishes_keeps_the_name_for_its_content(bucket: str) -> None:
    store = S3Store(bucket)
    writer = store.writer("models/m").__enter__()
    writer.write(BIG)
    killed = store.claimed("models/m", hashlib.sha256(BIG).hexdigest())
    killed.__enter__()
    with pytest.raises(ArtifactExists, match="models/m"):
        put(store, "models/m", BIG + b"!")
    put(store, "models/m", BIG)  # its next attempt
    assert content(store, "models/m") == BIG
    store.delete("models/m")
    store.claimed("models/m", "another's").__enter__()
    assert store.sweep(-60) == 1  # the upload, and the claim with it
    put(store, "models/m", BIG)
    assert list(store.keys("")) == ["models/m"]


def test_too_much_is_refused_and_leaves_nothing(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactTooLarge, match=f"{len(BIG) - 1} bytes"):
        put(store, "files/big", BIG, max_bytes=len(BIG) - 1)
    assert list(store.keys("")) == []
    assert store.sweep(-60) == 0
    put(store, "files/big", BIG, max_bytes=len(BIG))


def test_what_a_killed_process_left_is_swept_by_age(store: ArtifactStore) -> None:
    abandoned = store.writer("files/a").__enter__()
    abandoned.write(BIG)
    assert store.sweep(1e9) == 0  # to moto, every upload was begun in 2010
    assert store.sweep(-60) == 1
    with pytest.raises(ArtifactMissing):
        store.read("files/a")


def test_missing_artifacts_are_told_before_the_first_byte(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactMissing, match="files/none"):
        store.read("files/none")
    store.delete("files/none")
    put(store, "files/one", b"1")
    store.delete("files/one")
    assert list(store.keys("")) == []


def test_a_fetched_file_is_whole_and_has_its_hash(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(BIG)
    stored = put_file(store, "files/one", source)
    target = tmp_path / "work" / "rows.jsonl"
    assert fetch(store, "files/one", target, stored.sha256).read_bytes() == BIG
    store.delete("files/one")
    assert fetch(store, "files/one", target, stored.sha256) == target  # there already
    put(store, "files/one", b"changed")
    target.unlink()
    with pytest.raises(ArtifactCorrupt, match="files/one"):
        fetch(store, "files/one", target, stored.sha256)
    assert list(target.parent.iterdir()) == []


@given(st.text(max_size=30))
def test_no_key_leads_out_of_the_store(text: str) -> None:
    root = Path("/store/objects")
    try:
        key = check_key(text)
    except ValueError:
        return
    assert os.path.normpath(root / key).startswith("/store/objects/")
    assert "//" not in key and not any(part.startswith(".") for part in key.split("/"))


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../b", "a//b", "", "a/", "a\0b", "a b"])
def test_keys_that_are_paths_are_refused(store: ArtifactStore, key: str) -> None:
    calls: list[Callable[[str], Any]] = [store.read, store.delete, store.writer]
    for call in calls:
        with pytest.raises(ValueError, match="not an artifact key"):
            call(key)


def test_an_s3_link_serves_the_bytes_to_whoever_has_it(bucket: str) -> None:
    store = S3Store(bucket)
    put(store, "files/one", b"rows")
    url = store.link("files/one", 60, "mine äö.jsonl")
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"rows"
        assert "mine%20%C3%A4%C3%B6.jsonl" in answer.headers["Content-Disposition"]
    assert "X-Amz-Expires=60" in url


def test_a_directory_link_ends_and_cannot_be_changed(tmp_path: Path) -> None:
    now = [1000.0]
    store = DirectoryStore(tmp_path / "store", clock=lambda: now[0])
    link = store.link("files/one", 60, "mine.jsonl")
    token = link.removeprefix(DOWNLOADS)
    assert DirectoryStore(tmp_path / "store", clock=lambda: now[0]).follow(token) == (
        "files/one",
        "mine.jsonl",
    )
    for wrong in ("", "x", "a.b", token[:-2], token[1:], token.replace(".", ".A"), "ä." + token):
        with pytest.raises(ArtifactMissing):
            store.follow(wrong)
    now[0] += 61
    with pytest.raises(ArtifactMissing, match="no longer"):
        store.follow(token)
    assert (tmp_path / "store/link-secret").stat().st_mode & 0o077 == 0


def test_a_full_disk_is_a_fault_that_may_pass(tmp_path: Path) -> None:
    store = open_store(f"{tmp_path}/store")
    writer = store.writer("files/one").__enter__()
    # /dev/full answers every write with ENOSPC.
    writer._file.close()  # type: ignore[attr-defined]
    writer._file = open("/dev/full", "wb", buffering=0)  # type: ignore[attr-defined]  # noqa: SIM115
    with pytest.raises(ArtifactUnavailable, match="is full"):
        writer.write(b"x")
    writer.__exit__(None, None, None)
    assert store.sweep(-60) == 0


def test_a_store_that_does_not_answer_is_a_fault_that_may_pass(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = S3Store(bucket)
    monkeypatch.setattr("time.sleep", lambda _: None)  # boto3's backoff
    with pytest.raises(ArtifactUnavailable, match="does not answer"):
        store.read("files/one")


def test_a_bucket_that_is_not_there_is_a_fault(bucket: str) -> None:
    with pytest.raises(ArtifactUnavailable, match="NoSuchBucket"):
        put(S3Store("no-such-bucket"), "files/one", b"x")


@pytest.mark.parametrize("url", ["", "store", "s3://", "http://x/y", "file://host/x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="artifacts: must be"):
        open_store(url)

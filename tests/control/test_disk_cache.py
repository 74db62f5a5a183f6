"""Published adapters on a serving machine: whole, checked, bounded, and gone when refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest

from cluster.artifacts import open_store, s3
from cluster.serving.disk_cache import GRACE_S, Artifacts, DiskCache
from cluster.serving.registry import ADAPTER_FILES, Published
from safeft.cache import sha256_file
from safeft.errors import InputError, ModelError


def publish(url: str, tmp_path: Path, number: int, size: int = 1000) -> Published:
    """Two files of `size` bytes together."""
    store, files = open_store(url), {}
    for name in ADAPTER_FILES:
        path = tmp_path / "made"
        path.write_bytes(bytes([number]) * (size // 2))
        files[name] = sha256_file(path)
        with store.writer(f"tenants/a/models/{number}/{name}") as writer:
            writer.write(path.read_bytes())
            writer.commit()
    return Published(f"tenants/a/models/{number}", files)


def kept(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def test_a_published_adapter_is_fetched_once_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    url = f"s3://{bucket}/plane"
    published = publish(url, tmp_path, 1)
    cache = DiskCache(Artifacts(url), tmp_path / "cache")
    directory = cache.fetch(published)
    assert {p.name: sha256_file(p) for p in directory.iterdir()} == published.files
    client = boto3.client("s3")
    for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=entry["Key"])
    assert cache.fetch(published) == directory  # asks the bucket for nothing
    with pytest.raises(ModelError, match="not in the artifact store"):
        DiskCache(Artifacts(url), tmp_path / "other").fetch(published)
    assert kept(tmp_path / "other") == set()


def test_bytes_that_were_not_published_are_refused_and_not_kept(
    bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/plane"
    published = publish(url, tmp_path, 1)
    key = f"plane/{published.key('adapter_model.safetensors')}"
    good = boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=good[:-1] + b"x")
    cache = DiskCache(Artifacts(url), tmp_path / "cache")
    with pytest.raises(ModelError, match="other bytes than were published"):
        cache.fetch(published)
    assert kept(tmp_path / "cache") == set()
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=good)
    assert cache.fetch(published).is_dir()


def test_a_store_that_does_not_answer_is_told_without_its_address_and_asked_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/plane"
    there, missing = publish(url, tmp_path, 1), publish(url, tmp_path, 2)
    DiskCache(Artifacts(url), tmp_path / "cache").fetch(there)
    hasty: Any = botocore.config.Config(connect_timeout=1, retries={"total_max_attempts": 1})
    monkeypatch.setattr(s3, "_CONFIG", hasty)
    with monkeypatch.context() as gone:
        gone.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        cut_off = DiskCache(Artifacts(url), tmp_path / "cache")
        assert cut_off.fetch(there).is_dir()  # what is on the disk is served all the same
        with pytest.raises(ModelError, match="does not answer") as caught:
            cut_off.fetch(missing)
        assert "127.0.0.1" not in str(caught.value)
    assert DiskCache(Artifacts(url), tmp_path / "cache").fetch(missing).is_dir()


def test_those_used_longest_ago_go_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    url, now = f"file://{tmp_path}/artifacts", [1000.0]
    first, second, third = (publish(url, tmp_path, number) for number in (1, 2, 3))
    cache = DiskCache(Artifacts(url, cache_bytes=2500), tmp_path / "cache", lambda: now[0])
    for published in (first, second):
        cache.fetch(published)
        now[0] += GRACE_S + 1
    cache.fetch(first)  # used again: the second one is now the oldest
    now[0] += GRACE_S + 1
    cache.fetch(third)
    assert kept(tmp_path / "cache") == {first.id, third.id}
    cache.fetch(second)  # `third` is being read: it stays, whatever the limit
    assert kept(tmp_path / "cache") == {second.id, third.id}
    fourth = publish(url, tmp_path, 4)
    cache.fetch(fourth)
    assert kept(tmp_path / "cache") == {second.id, third.id, fourth.id}


def test_what_was_changed_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/artifacts"
    published = publish(url, tmp_path, 1)
    cache = DiskCache(Artifacts(url), tmp_path / "cache")
    weights = cache.fetch(published) / "adapter_model.safetensors"
    weights.write_bytes(b"changed")
    assert sha256_file(cache.fetch(published) / weights.name) == published.files[weights.name]
    os.unlink(weights)
    assert cache.fetch(published) / weights.name == weights and weights.is_file()


def test_many_at_once_find_one_whole_entry(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/artifacts"
    published = publish(url, tmp_path, 1, size=1 << 20)
    caches = [DiskCache(Artifacts(url), tmp_path / "cache") for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda cache: cache.fetch(published), caches))
    assert len(set(found)) == 1
    assert kept(tmp_path / "cache") == {published.id}


@pytest.mark.parametrize(
    ("prefix", "files"),
    [
        ("../../etc", dict.fromkeys(ADAPTER_FILES, "0" * 64)),
        ("tenants/a", {"adapter_config.json": "0" * 64}),
        ("tenants/a", {**dict.fromkeys(ADAPTER_FILES, "0" * 64), "x": "0" * 64}),
        ("tenants/a", dict.fromkeys(ADAPTER_FILES, "0")),
    ],
)
def test_what_is_no_published_adapter_is_refused(prefix: str, files: dict[str, str]) -> None:
    with pytest.raises(InputError, match="artifact"):
        Published(prefix, files)

"""Objects on S3, by boto3: its usual credentials, and AWS_ENDPOINT_URL for other servers."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safeft.errors import InputError

_CHUNK = 1 << 20


def is_prefix(url: str) -> bool:
    """Whether `url` stands for everything below it."""
    return url.endswith("/") or not _split(url)[1]


def find(url: str) -> dict[str, str]:
    """URL and ETag of each object that `url` names: one key, a prefix, or a pattern.

    In a pattern ``*`` and ``?`` stand for characters between two slashes.

    Raises:
        InputError: the object or bucket is not there, or S3 does not answer.
    """
    bucket, key = _split(url)
    if not is_prefix(url) and not glob.has_magic(key):
        return {url: etag(url)}
    start = len(key) if is_prefix(url) else min(key.find(c) for c in "*?[" if c in key)
    found = {}
    with _errors(url):
        pages = _client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=key[:start]):
            for held in page.get("Contents", []):
                name = held["Key"]
                if name.endswith("/"):  # how consoles mark a directory
                    continue
                if is_prefix(url) or PurePosixPath(f"/{name}").match(f"/{key}"):
                    found[f"s3://{bucket}/{name}"] = str(held["ETag"])
    return found


def etag(url: str) -> str:
    """The ETag of the object that is there now.

    Raises:
        InputError: there is none, or S3 does not answer.
    """
    bucket, key = _split(url)
    with _errors(url):
        return str(_client().head_object(Bucket=bucket, Key=key)["ETag"])


def fetch(url: str, etag: str, path: Path, max_bytes: int) -> None:
    """Copy the object with this very ETag to `path`.

    Raises:
        InputError: it was replaced, is larger than `max_bytes`, or cannot be read.
    """
    bucket, key = _split(url)
    with _errors(url):
        held = _client().get_object(Bucket=bucket, Key=key, IfMatch=etag)
        if held["ContentLength"] > max_bytes:
            raise InputError(
                f"{url}: is {held['ContentLength']} bytes, over max_file_bytes={max_bytes} "
                "bytes: split the file"
            )
        with open(path, "wb") as file:
            for chunk in held["Body"].iter_chunks(_CHUNK):
                file.write(chunk)


def _client() -> Any:
    import boto3

    return boto3.client("s3")


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise InputError(f"{url}: names no bucket; write s3://bucket/key")
    return bucket, key


@contextmanager
def _errors(url: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        if code in ("PreconditionFailed", "412"):
            raise InputError(f"{url}: changed while it was screened; screen it again") from None
        if code in ("404", "NoSuchKey", "NoSuchBucket"):
            raise InputError(
                f"{url}: is not there ({code}); end a prefix with / to mean all below it"
            ) from None
        raise InputError(f"{url}: S3 refuses to show it ({code})") from None
    except (BotoCoreError, Boto3Error) as error:
        raise InputError(f"{url}: S3 cannot be read: {' '.join(str(error).split())}") from None

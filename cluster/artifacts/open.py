"""From a URL to a store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from cluster.artifacts.directory import DirectoryStore
from cluster.artifacts.s3 import S3Store
from cluster.artifacts.store import ArtifactStore
from safeft.errors import InputError


def open_store(url: str) -> ArtifactStore:
    """The store at ``file:///absolute/path``, an absolute path, or ``s3://bucket/prefix``.

    Credentials, region and endpoint of S3 are boto3's usual ones (``AWS_ENDPOINT_URL`` ...).

    Raises:
        InputError: the URL is neither.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(parts.netloc, parts.path.strip("/"))
    path = Path(parts.path if parts.scheme == "file" and not parts.netloc else url)
    if path.is_absolute():
        return DirectoryStore(path)
    raise InputError(f"artifacts: must be file:///absolute/path or s3://bucket/prefix, not {url!r}")

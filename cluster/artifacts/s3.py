"""A bucket as a store: multipart, checksums on every part, and names that are written once."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import boto3
import botocore.config
import botocore.exceptions as failures

from cluster.artifacts.store import (
    BLOCK,
    ArtifactExists,
    ArtifactMissing,
    ArtifactUnavailable,
    ArtifactWriter,
    Stored,
    check_key,
)

PART = 8 << 20  # what is held in memory for each upload; 10,000 parts make 78 GiB
_CONFIG = botocore.config.Config(
    signature_version="s3v4",
    connect_timeout=10,
    read_timeout=60,
    retries={"mode": "standard", "total_max_attempts": 4},
)
_MISSING = {"NoSuchKey", "404", "NotFound"}
_ENDED = "NoSuchUpload"  # finished by a request whose answer was lost, or swept: try again
_CLAIMS = ".claims/"  # no key begins so
_TAKEN = {"PreconditionFailed", "412"}


class S3Store:
    """Artifacts in `bucket` below `prefix`.

    The bucket must honour ``If-None-Match: *`` on puts, as AWS and Ceph do; without that, two
    publications of one name are not kept apart. Ceph 16 ignores it at the end of a multipart
    upload, so whoever ends one claims the name with a put first.
    """

    def __init__(
        self, bucket: str, prefix: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        self.bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._clock = clock
        self.client: Any = boto3.client("s3", config=_CONFIG)

    def writer(self, key: str, max_bytes: int | None = None) -> ArtifactWriter:
        return _Writer(self, key, max_bytes)

    def read(self, key: str) -> Iterator[bytes]:
        with told(key):
            body = self.client.get_object(**self.named(key), ChecksumMode="ENABLED")["Body"]

        def blocks() -> Iterator[bytes]:
            with body, told(key):
                yield from body.iter_chunks(BLOCK)

        return blocks()

    def delete(self, key: str) -> None:
        with told(key):
            self.client.delete_object(**self.named(key))

    def keys(self, prefix: str) -> Iterator[str]:
        pages = self.client.get_paginator("list_objects_v2")
        with told(prefix):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    if not key.startswith(_CLAIMS):
                        yield key

    def link(self, key: str, seconds: int, filename: str) -> str:
        disposition = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        parameters = {**self.named(key), "ResponseContentDisposition": disposition}
        url: str = self.client.generate_presigned_url("get_object", parameters, ExpiresIn=seconds)
        return url

    def sweep(self, older_than_s: float) -> int:
        limit, removed = self._clock() - older_than_s, 0
        pages = self.client.get_paginator("list_multipart_uploads")
        with told("uploads"):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() < limit:
                        self.abort(upload["Key"], upload["UploadId"])
                        removed += 1
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix + _CLAIMS):
                for claim in page.get("Contents", ()):
                    if claim["LastModified"].timestamp() < limit:
                        self.client.delete_object(Bucket=self.bucket, Key=claim["Key"])
        return removed

    @contextmanager
    def claimed(self, key: str, content: str) -> Iterator[None]:
        """For the length of the block, only this content may be given this name.

        Raises:
            ArtifactExists: the name is taken, or is being given to another content just now.
        """
        claim = {"Bucket": self.bucket, "Key": f"{self._prefix}{_CLAIMS}{key}"}
        with told(key):
            while not self._claim(claim, content.encode()):
                pass  # somebody gave it back just now
            taken = self._is_there(key)  # after the claim: who had it before has ended by now
            if not taken:
                yield  # where this fails the claim stays: whether it did in truth is not known
            self.client.delete_object(**claim)
        if taken:
            raise ArtifactExists(f"{key}: holds another content already")

    def _claim(self, claim: dict[str, str], content: bytes) -> bool:
        """Whether the claim is this content's now; it is swept where nobody ends what was begun."""
        try:
            self.client.put_object(**claim, Body=content, IfNoneMatch="*")
        except failures.ClientError as error:
            if error.response["Error"]["Code"] not in _TAKEN:
                raise
            try:
                found = self.client.get_object(**claim)["Body"].read()
            except failures.ClientError as gone:
                if gone.response["Error"]["Code"] in _MISSING:
                    return False
                raise
            if found != content:
                raise
        return True

    def _is_there(self, key: str) -> bool:
        try:
            self.client.head_object(**self.named(key))
        except failures.ClientError as error:
            if error.response["Error"]["Code"] in _MISSING:
                return False
            raise
        return True

    def named(self, key: str) -> dict[str, str]:
        """The object as boto3's arguments."""
        return {"Bucket": self.bucket, "Key": self._prefix + check_key(key)}

    def abort(self, full_key: str, upload: str) -> None:
        """Remove an unfinished upload; one that is gone is fine."""
        try:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=full_key, UploadId=upload)
        except failures.ClientError as error:
            if error.response["Error"]["Code"] != _ENDED:
                raise


class _Writer(ArtifactWriter):
    """One put for what fits into a part, otherwise a multipart upload."""

    def __init__(self, store: S3Store, key: str, max_bytes: int | None) -> None:
        super().__init__(store, key, max_bytes)
        self._s3 = store
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def _write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) > PART:  # the last part is never empty
            self._send(bytes(self._buffer[:PART]))
            del self._buffer[:PART]

    def _publish(self, stored: Stored) -> None:
        client, named = self._s3.client, self._s3.named(self.key)
        if self._upload is None:
            body = bytes(self._buffer)
            with told(self.key):
                client.put_object(
                    **named, Body=body, IfNoneMatch="*", ChecksumSHA256=_checksum(body)
                )
            return
        self._send(bytes(self._buffer))
        self._buffer.clear()
        with told(self.key), self._s3.claimed(self.key, stored.sha256):
            client.complete_multipart_upload(
                **named,
                UploadId=self._upload,
                MultipartUpload={"Parts": self._parts},
                IfNoneMatch="*",
            )

    def _discard(self) -> None:
        self._buffer.clear()
        if self._upload is not None:
            with told(self.key):
                self._s3.abort(self._s3.named(self.key)["Key"], self._upload)

    def _send(self, part: bytes) -> None:
        client, named = self._s3.client, self._s3.named(self.key)
        with told(self.key):
            if self._upload is None:
                begun = client.create_multipart_upload(**named, ChecksumAlgorithm="SHA256")
                self._upload = begun["UploadId"]
            number, checksum = len(self._parts) + 1, _checksum(part)
            sent = client.upload_part(
                **named,
                UploadId=self._upload,
                PartNumber=number,
                Body=part,
                ChecksumSHA256=checksum,
            )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum})


def _checksum(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


@contextmanager
def told(what: str) -> Iterator[None]:
    """Errors of S3 as the store's: gone, taken, or not to be had now."""
    try:
        yield
    except failures.ClientError as error:
        code = error.response["Error"]["Code"]
        if code in _MISSING:
            raise ArtifactMissing(f"{what}: there is no such artifact") from None
        if code in _TAKEN:
            raise ArtifactExists(f"{what}: holds another content already") from None
        raise ArtifactUnavailable(f"the artifact store refuses {what}: {code}") from error
    except (failures.BotoCoreError, failures.HTTPClientError) as error:
        raise ArtifactUnavailable(
            f"the artifact store does not answer ({type(error).__name__})"
        ) from error

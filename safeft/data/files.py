"""Opening an uploaded file: told by its first bytes, decompressed, never more than allowed.

Everything wrong with the file itself is an InputError that names it. Nothing here trusts the name.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safeft.errors import InputError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_REFUSED = {
    b"PK\x03\x04": "a zip archive: upload the file itself, or compress it with gzip or zstd",
    b"\xfd7zX": "xz-compressed: use gzip or zstd",
    b"BZh": "bzip2-compressed: use gzip or zstd",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
_BUFFER = 1 << 16


class _Decompressed(io.RawIOBase):
    """A decompressor's output, cut off at `limit` bytes, with errors that name the file."""

    def __init__(self, inner: Any, path: Path, kind: str, limit: int) -> None:
        self._inner, self._path, self._kind, self._limit = inner, path, kind, limit
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data: bytes = self._inner.read(len(buffer))
        except (EOFError, OSError, zlib.error) as err:
            # gzip raises EOFError; Arrow's zstandard an OSError that says so.
            if isinstance(err, EOFError) or "truncated" in str(err).lower():
                what = "is truncated: it ends before its compressed data does; upload it again"
            else:
                what = f"is damaged and cannot be decompressed ({err}); upload it again"
            raise InputError(f"{self._path}: the {self._kind} file {what}") from err
        self._total += len(data)
        if self._total > self._limit:
            raise too_large(self._path, "decompresses to more than", self._limit)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def too_large(path: Path, what: str, limit: int) -> InputError:
    return InputError(f"{path}: {what} max_file_bytes={limit} bytes: split the file")


@contextmanager
def open_dataset(path: Path, max_file_bytes: int) -> Iterator[io.BufferedReader]:
    """Open `path` for reading its content, decompressing gzip and zstandard by magic bytes.

    Raises InputError: not found, no permission, not a regular file, empty, too large, or of a kind
    that is not accepted; and, while the stream is read, if it is truncated, damaged or decompresses
    to more than `max_file_bytes`.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a directory: name one file")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a regular file")
        if status.st_size == 0:
            raise InputError(f"{path}: is empty")
        if status.st_size > max_file_bytes:
            raise too_large(path, f"is {status.st_size} bytes, over", max_file_bytes)
        with open(path, "rb") as raw:
            magic = raw.read(4)
            raw.seek(0)
            with _decompress(raw, magic, path, max_file_bytes) as stream:
                head = stream.peek(4)[:4]
                for start, what in _REFUSED.items():
                    if head.startswith(start):
                        raise InputError(f"{path}: is {what}")
                yield stream
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror or err}") from err


def _decompress(
    raw: io.BufferedReader, magic: bytes, path: Path, max_file_bytes: int
) -> io.BufferedReader:
    inner: Any
    if magic.startswith(_GZIP):
        kind, inner = "gzip", gzip.GzipFile(fileobj=raw, mode="rb")
    elif magic == _ZSTD:
        try:
            import pyarrow as pa
        except ImportError as err:
            raise InputError(
                f"{path}: reading zstandard needs pyarrow: pip install pyarrow"
            ) from err
        kind, inner = "zstandard", pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    else:
        return raw
    return io.BufferedReader(_Decompressed(inner, path, kind, max_file_bytes), _BUFFER)


@contextmanager
def seekable(stream: io.BufferedReader) -> Iterator[BinaryIO]:
    """`stream` itself if it can seek, otherwise a copy in an unnamed temporary file."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        while chunk := stream.read(_BUFFER):
            copy.write(chunk)
        copy.seek(0)
        yield copy

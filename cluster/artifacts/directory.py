"""A directory as a store: written aside, flushed, and linked into place only where nothing is."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.artifacts.store import (
    BLOCK,
    ArtifactExists,
    ArtifactMissing,
    ArtifactUnavailable,
    ArtifactWriter,
    Stored,
    check_key,
)
from safeft.cache import write_whole

DOWNLOADS = "/v1/safety/downloads/"


class DirectoryStore:
    """Artifacts below `root`; every process that uses it is on the same file system."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._objects, self._uploads = root / "objects", root / "uploads"
        with _told(root):
            self._objects.mkdir(parents=True, exist_ok=True)
            self._uploads.mkdir(exist_ok=True)

    def writer(self, key: str, max_bytes: int | None = None) -> ArtifactWriter:
        return _Writer(self, self._uploads, self._path(key), key, max_bytes)

    def read(self, key: str) -> Iterator[bytes]:
        try:
            file = self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ArtifactMissing(f"{key}: there is no such artifact") from None

        def blocks() -> Iterator[bytes]:
            with file, _told(self.root):
                while block := file.read(BLOCK):
                    yield block

        return blocks()

    def delete(self, key: str) -> None:
        with _told(self.root):
            self._path(key).unlink(missing_ok=True)

    def keys(self, prefix: str) -> Iterator[str]:
        directory = prefix.rpartition("/")[0]
        start = self._path(directory) if directory else self._objects
        found = (path for path in start.rglob("*") if path.is_file())
        names = (path.relative_to(self._objects).as_posix() for path in found)
        yield from sorted(name for name in names if name.startswith(prefix))

    def link(self, key: str, seconds: int, filename: str) -> str:
        """See ArtifactStore; the API answers it with `follow`."""
        fields = [check_key(key), filename, int(self._clock()) + seconds]
        text = json.dumps(fields, separators=(",", ":")).encode()
        return DOWNLOADS + _encode(text) + "." + _encode(self._sign(text))

    def follow(self, token: str) -> tuple[str, str]:
        """Key and file name behind the last part of a link.

        Raises:
            ArtifactMissing: it was not made here, was changed, or has expired.
        """
        text, _, signature = token.partition(".")
        try:
            content = _decode(text)
            good = hmac.compare_digest(_decode(signature), self._sign(content))
        except ValueError:
            good = False
        if good:
            key, filename, until = json.loads(content)
            if self._clock() < until:
                return key, filename
        raise ArtifactMissing("the link is not valid, or no longer; ask for a new one")

    def sweep(self, older_than_s: float) -> int:
        limit, removed = self._clock() - older_than_s, 0
        for path in self._uploads.iterdir():
            with suppress(FileNotFoundError):  # finished, or swept by somebody else, meanwhile
                if path.stat().st_mtime < limit:
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, key: str) -> Path:
        return self._objects / check_key(key)

    def _sign(self, content: bytes) -> bytes:
        return hmac.digest(self._link_secret(), content, hashlib.sha256)

    def _link_secret(self) -> bytes:
        path = self.root / "link-secret"
        with _told(self.root):
            if not path.exists():
                # Two processes may make it at once: the one that links it first wins.
                mine = self._uploads / secrets.token_hex(16)
                write_whole(mine, secrets.token_bytes(32))
                mine.chmod(0o600)
                with suppress(FileExistsError):
                    os.link(mine, path)
                mine.unlink()
            return path.read_bytes()


class _Writer(ArtifactWriter):
    def __init__(
        self, store: DirectoryStore, uploads: Path, target: Path, key: str, max_bytes: int | None
    ) -> None:
        super().__init__(store, key, max_bytes)
        self._root = store.root
        self._target = target
        self._partial = uploads / secrets.token_hex(16)
        with _told(self._root):
            self._file = self._partial.open("xb")

    def _write(self, data: bytes) -> None:
        with _told(self._root):
            self._file.write(data)

    def _publish(self, stored: Stored) -> None:
        with _told(self._root):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._partial, self._target)  # unlike a rename, replaces nothing
            except FileExistsError:
                raise ArtifactExists(f"{self.key}: holds another content already") from None
            _flush_directory(self._target.parent)
            self._partial.unlink(missing_ok=True)

    def _discard(self) -> None:
        # A full disk may refuse the flush of what is thrown away.
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """Errors of the disk as the store's."""
    try:
        yield
    except OSError as error:
        why = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise ArtifactUnavailable(f"the artifact directory {root}: {why}") from error


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)

"""What a store promises, whatever keeps the bytes.

An artifact is whole or absent, and its name is given once: writing another content under it fails,
the same content again is fine, so that a repeated publication is harmless.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from safeft.cache import scratch_dir
from safeft.errors import SafeftError

BLOCK = 1 << 20
_KEY = re.compile(r"[a-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_LONGEST_KEY = 240


class ArtifactError(SafeftError):
    """Something about a stored artifact."""


class ArtifactMissing(ArtifactError):
    """There is no artifact under this name."""


class ArtifactExists(ArtifactError):
    """The name is taken by another content."""


class ArtifactTooLarge(ArtifactError):
    """More bytes than the writer was allowed."""


class ArtifactCorrupt(ArtifactError):
    """The bytes are not those that were stored."""


class ArtifactUnavailable(ArtifactError):
    """The store does not answer, or is full; trying again later may help."""


@dataclass(frozen=True)
class Stored:
    """A finished artifact's size and SHA-256 (lower-case hex)."""

    bytes: int
    sha256: str


def check_key(key: str) -> str:
    """`key`, where it is one: slash-separated names without dots in front. Made by us, from ids."""
    if len(key) > _LONGEST_KEY or not _KEY.fullmatch(key):
        raise ValueError(f"not an artifact key: {key[:60]!r}")
    return key


class ArtifactWriter(ABC):
    """Takes an artifact's bytes and hashes them on the way; nothing is there until `commit`.

    A context manager: whatever was not committed at its end is removed.
    """

    def __init__(self, store: ArtifactStore, key: str, max_bytes: int | None) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._size = 0
        self._open = True
        self.key = check_key(key)

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            ArtifactTooLarge: with `data` there are more than `max_bytes`.
            ArtifactUnavailable: the store failed.
        """
        self._size += len(data)
        if self._max_bytes is not None and self._size > self._max_bytes:
            raise ArtifactTooLarge(f"more than {self._max_bytes} bytes")
        self._hash.update(data)
        self._write(data)

    def commit(self) -> Stored:
        """Make the artifact appear, all of it at once.

        Raises:
            ArtifactExists: the name holds another content.
            ArtifactUnavailable: the store failed.
        """
        stored = Stored(self._size, self._hash.hexdigest())
        try:
            self._publish(stored)
        except ArtifactExists:
            # Ours, where an answer was lost and the request repeated, or published before.
            if not self._is_there(stored):
                raise
            self._discard()
        self._open = False
        return stored

    def _is_there(self, stored: Stored) -> bool:
        try:
            return digest(self._store, self.key) == stored
        except ArtifactMissing:  # another content is about to get the name
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open:
            self._open = False
            self._discard()

    @abstractmethod
    def _write(self, data: bytes) -> None: ...

    @abstractmethod
    def _publish(self, stored: Stored) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...


class ArtifactStore(Protocol):
    """Where artifacts are kept."""

    def writer(
        self, key: str, max_bytes: int | None = None
    ) -> AbstractContextManager[ArtifactWriter]:
        """Begin an artifact of at most `max_bytes`."""
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """The artifact in blocks; ArtifactMissing is raised before the first one."""
        ...

    def delete(self, key: str) -> None:
        """Remove the artifact; one that is not there is fine."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key that begins with `prefix`, in order."""
        ...

    def link(self, key: str, seconds: int, filename: str) -> str:
        """A URL that anybody may read the artifact from for so long.

        A directory's is a path of the API (``/v1/safety/downloads/...``).
        """
        ...

    def sweep(self, older_than_s: float) -> int:
        """Remove uploads that were begun so long ago and never finished; how many."""
        ...


def digest(store: ArtifactStore, key: str) -> Stored:
    """Read the artifact and hash it."""
    size, found = 0, hashlib.sha256()
    for block in store.read(key):
        size += len(block)
        found.update(block)
    return Stored(size, found.hexdigest())


def fetch(store: ArtifactStore, key: str, target: Path, sha256: str) -> Path:
    """Copy an artifact to `target`, which is then whole and has this hash.

    A `target` that already does is left as it is.

    Raises:
        ArtifactMissing, ArtifactUnavailable: from the store.
        ArtifactCorrupt: the store's bytes have another hash.
    """
    if target.is_file():
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return target
    with scratch_dir(target) as staging:
        found = hashlib.sha256()
        with (staging / "bytes").open("wb") as file:
            for block in store.read(key):
                found.update(block)
                file.write(block)
        if found.hexdigest() != sha256:
            was = found.hexdigest()[:16]
            raise ArtifactCorrupt(
                f"{key}: its SHA-256 is {was}, not {sha256[:16]}; upload it again"
            )
        (staging / "bytes").replace(target)
    return target


def put_file(store: ArtifactStore, key: str, path: Path) -> Stored:
    """Store a file. See `ArtifactWriter.commit` for what is raised."""
    with path.open("rb") as file, store.writer(key) as writer:
        while block := file.read(BLOCK):
            writer.write(block)
        return writer.commit()

"""Published adapters on this machine's disk, fetched from the artifact store on demand.

Replicas and keeper of one machine share the directory. An entry is named by the hashes of its files
and appears whole; its bytes are checked each time it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.artifacts import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactMissing,
    ArtifactStore,
    fetch,
    open_store,
)
from cluster.serving.registry import Published
from safeft.cache import cache_root, discard_dir, is_disk_full, locked, publish_dir, sha256_file
from safeft.errors import ModelError

log = logging.getLogger(__name__)
_ENTRY = re.compile(r"[0-9a-f]{64}")
#: Who was just given an entry reads its files: it stays for so long, whatever the limit says.
GRACE_S = 120.0


@dataclass(frozen=True)
class Artifacts:
    """Where published adapters are, and how much of them a machine keeps.

    Attributes:
        url: of the artifact store, as `cluster.artifacts.open_store` takes it.
        cache_bytes: on each machine's disk. What was used in the last two minutes is kept beyond.
    """

    url: str
    cache_bytes: int = 8 * 2**30

    def cache(self) -> DiskCache:
        """This machine's."""
        return DiskCache(self, cache_root() / "serving" / "adapters")


class DiskCache:
    """Adapters by their files' hashes; those used longest ago go. Safe to share by processes."""

    def __init__(
        self, artifacts: Artifacts, root: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self._artifacts, self._root, self._clock = artifacts, root, clock
        self._lock = threading.Lock()
        self._opened: ArtifactStore | None = None

    def fetch(self, published: Published) -> Path:
        """A directory with exactly the published files.

        Raises:
            ModelError: the store does not answer or has other bytes, or the disk is full. Nothing
                of that is kept: the next call tries again.
        """
        entry = self._root / published.id
        try:
            if not self._has(entry, published):
                with publish_dir(entry) as staging:
                    for name, sha256 in published.files.items():
                        fetch(self._store(), published.key(name), staging / name, sha256)
                self._make_room(entry)
        except (ArtifactError, OSError) as error:
            # Who asks for the model reads what is raised; keys and paths are for the log.
            log.warning("an adapter cannot be fetched: %s", error)
            raise ModelError(_why(error)) from error
        return entry

    def _has(self, entry: Path, published: Published) -> bool:
        """Whether the entry is there and whole; it then counts as used."""
        with self._alone():
            if not entry.is_dir():
                return False
            now = self._clock()
            os.utime(entry, (now, now))
        if all(
            (entry / name).is_file() and sha256_file(entry / name) == sha256
            for name, sha256 in published.files.items()
        ):
            return True
        log.warning("%s: was changed on the disk; it is fetched again", entry)
        self._discard(entry)
        return False

    def _make_room(self, newest: Path) -> None:
        """Remove what was used longest ago until the rest is within the limit."""
        now = self._clock()
        os.utime(newest, (now, now))
        with self._alone():
            entries = sorted(
                (path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path)
                for path in self._root.iterdir()
                if _ENTRY.fullmatch(path.name)
            )
        total = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            if total <= self._artifacts.cache_bytes or used > now - GRACE_S:
                return
            self._discard(path, unused_since=used)
            total -= size

    def _discard(self, entry: Path, unused_since: float | None = None) -> None:
        with self._alone(), contextlib.suppress(FileNotFoundError):
            if unused_since is None or entry.stat().st_mtime <= unused_since:
                discard_dir(entry)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return locked(self._root / "entries")

    def _store(self) -> ArtifactStore:
        with self._lock:  # boto3 makes clients in one thread at a time
            if self._opened is None:
                self._opened = open_store(self._artifacts.url)
            return self._opened


def _why(error: Exception) -> str:
    if isinstance(error, ArtifactCorrupt):
        return "the artifact store holds other bytes than were published; publish the model again"
    if isinstance(error, ArtifactMissing):
        return "its files are not in the artifact store"
    if is_disk_full(error):
        return "the disk of the serving machine is full; try again later"
    if isinstance(error, OSError):
        return "the serving machine cannot keep it on its disk; its log says why"
    return "the artifact store does not answer; try again later"

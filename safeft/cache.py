"""Directories that are whole or not there, and the cache that holds them.

A directory is made in a staging directory beside its final name and renamed into place when every
byte is on the disk, so that a name without ``.staging+`` in it never holds half of anything.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safeft.errors import ModelError
from safeft.progress import Progress, silent

_STAGING = re.compile(r"\..+\.staging\+(?P<owner>.+)\+(?P<pid>\d+)\+[0-9a-f]{8}")


def cache_root() -> Path:
    """$SAFEFT_CACHE, else $XDG_CACHE_HOME/safeft, else ~/.cache/safeft. Not created here."""
    if own := os.environ.get("SAFEFT_CACHE"):
        return Path(own).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "safeft"
    return Path.home() / ".cache" / "safeft"


def sha256_file(path: str | Path) -> str:
    """The file's SHA-256 in lower-case hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def scratch_dir(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, on the same filesystem, gone at the end.

    What killed processes left behind in ``target.parent`` is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    # mkdir rather than mkdtemp: the published directory then follows the user's umask.
    staging = _staging_name(target)
    staging.mkdir()
    try:
        yield staging
    finally:
        # What cannot be removed now keeps a staging name and is swept later.
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def publish_dir(target: Path) -> Iterator[Path]:
    """Yield a staging directory that becomes `target` when the block ends without an error.

    On any error, a KeyboardInterrupt included, the staging directory is removed and `target` is
    untouched. Where somebody else published `target` meanwhile, theirs stays and ours is removed.

    Raises:
        OSError: the files could not be written out or the directory not be renamed.
    """
    with scratch_dir(target) as staging:
        yield staging
        _flush(staging)
        try:
            os.rename(staging, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        _fsync(target.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that `path` holds all of it or what it held before; text is UTF-8.

    Raises:
        OSError: the directory is missing or cannot be written to, or the disk is full.
    """
    partial = _staging_name(path)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _fsync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def discard_dir(target: Path) -> None:
    """Remove a published directory: its name is free at once, whatever happens after."""
    with scratch_dir(target) as staging:
        os.rename(target, staging / target.name)


@contextmanager
def locked(target: Path, progress: Progress = silent) -> Iterator[None]:
    """Hold the lock of `target`: one process, and one thread, at a time is inside.

    Waits without a limit for the holder, whose lock ends with its process, and says so once.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that prepares {target.name}", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_disk(path: Path, bytes_needed: int, what: str) -> None:
    """Check for room before the work, rather than fail in the middle of it.

    Args:
        path: where the bytes will go; it need not exist yet.
        what: names the thing in the message.

    Raises:
        ModelError: fewer than `bytes_needed` bytes are free on the filesystem of `path`.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise ModelError(
            f"{what}: needs {_megabytes(bytes_needed)} of disk at {path}, but {_megabytes(free)} "
            "is free; make room or set SAFEFT_CACHE to a directory on another disk"
        )


def is_disk_full(error: BaseException | str) -> bool:
    """Whether `error`, or a text that another program printed, says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Rust libraries (safetensors) and subprocesses report it as text only.
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _owner() -> str:
    """Host and pid namespace: a pid says nothing about a process of another container."""
    namespace = 0
    with contextlib.suppress(FileNotFoundError):  # no /proc: not Linux, so no pid namespaces
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{socket.gethostname()}.{namespace}"


def _staging_name(target: Path) -> Path:
    """A name beside `target` that says whose it is, so that a dead process's can be swept."""
    unique = f"{_owner()}+{os.getpid()}+{secrets.token_hex(4)}"
    return target.parent / f".{target.name}.staging+{unique}"


def _sweep(parent: Path) -> None:
    """Remove what dead processes left staged. Other hosts' is left alone."""
    for path in parent.iterdir():
        match = _STAGING.fullmatch(path.name)
        if match and match["owner"] == _owner() and not _alive(int(match["pid"])):
            # Another process may be sweeping it too.
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def _flush(directory: Path) -> None:
    """Every file and directory below on the disk, readable by whoever may read the directory."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors writes 0600 whatever the umask says
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Which files a dataset is made of: named one by one, by a pattern, by a directory, or on S3."""

from __future__ import annotations

import glob
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath

from jobs.screening import s3
from safeft.cache import sha256_file
from safeft.data import RowLimits
from safeft.errors import InputError

Source = str | Path
_HIDDEN = (".", "_")
_ENDINGS = tuple(kind + packed for kind in (".jsonl", ".parquet") for packed in ("", ".gz", ".zst"))


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset.

    Attributes:
        source: absolute path, or ``s3://bucket/key``.
        name: what its rows are known by: the path below the directory that all files share.
        etag: of the S3 object when it was found; None for a local file.
    """

    source: str
    name: str
    etag: str | None = None

    @contextmanager
    def opened(self, limits: RowLimits) -> Iterator[Path]:
        """A local file with its content; of an S3 object a copy that is gone afterwards.

        An object is copied first because rows are read as slowly as they are scored, and a
        connection does not stay open for hours.

        Raises:
            InputError: it cannot be fetched, is too large, or is another object than was found.
        """
        if self.etag is None:
            yield Path(self.source)
            return
        with tempfile.TemporaryDirectory(prefix="safeft-s3-") as scratch:
            copy = Path(scratch) / "object"
            s3.fetch(self.source, self.etag, copy, limits.max_file_bytes)
            try:
                yield copy
            except InputError as error:
                raise InputError(str(error).replace(str(copy), self.source)) from None

    def still(self, sha256: str) -> bool:
        """Whether the file is still the one that hashed to `sha256`."""
        if self.etag is None:
            return Path(self.source).is_file() and sha256_file(self.source) == sha256
        return s3.etag(self.source) == self.etag


def find_files(sources: Source | Sequence[Source]) -> list[DataFile]:
    """The files of one dataset: in the order given, those of a directory or pattern by name.

    A directory or an S3 prefix (ending in ``/``) stands for all .jsonl and .parquet files below
    it, plain or compressed; names that begin with a dot or an underscore are passed over, and any
    other file is an error, so that nothing is left out unseen.

    Raises:
        InputError: nothing is there, a file is named twice, or S3 does not answer.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    files = [file for source in given for file in _expand(str(source))]
    if not files:
        raise InputError("no dataset is named")
    twice, times = Counter(file.source for file in files).most_common(1)[0]
    if times > 1:
        raise InputError(f"{twice}: is named {times} times; name each file once")
    levels = zip(*(PurePosixPath(file.source).parent.parts for file in files), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return [
        replace(file, name="/".join(PurePosixPath(file.source).parts[shared:])) for file in files
    ]


def _expand(source: str) -> list[DataFile]:
    if source.startswith("s3://"):
        found = s3.find(source)
        if s3.is_prefix(source):
            found = {url: found[url] for url in _data_files(found, source)}
        files = [DataFile(url, "", etag) for url, etag in found.items()]
    elif os.path.isdir(source):
        files = [DataFile(path, "") for path in _data_files(_below(source), source)]
    elif glob.has_magic(source) and not os.path.exists(source):
        matched = (os.path.abspath(p) for p in glob.glob(source, recursive=True))
        files = [DataFile(path, "") for path in sorted(matched) if os.path.isfile(path)]
    else:
        return [DataFile(os.path.abspath(source), "")]
    if not files:
        raise InputError(f"{source}: no .jsonl or .parquet file is there")
    return files


def _below(root: str) -> Iterator[str]:
    """Everything below a directory that is no directory to go into.

    A link to a directory is not followed, it might lead in a circle; as it is no data file either,
    `_data_files` refuses it.

    Raises:
        InputError: a directory cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}") from None

    for directory, names, files in os.walk(os.path.abspath(root), onerror=refuse):
        names[:] = [name for name in names if not name.startswith(_HIDDEN)]
        yield from (os.path.join(directory, name) for name in files)
        linked = (os.path.join(directory, name) for name in names)
        yield from filter(os.path.islink, linked)


def _data_files(paths: Iterable[str], root: str) -> list[str]:
    kept = []
    base = root if root.startswith("s3://") else os.path.abspath(root)
    for path in sorted(paths):
        below = path[len(base) :].strip("/").split("/")
        if any(part.startswith(_HIDDEN) for part in below):
            continue
        if not path.endswith(_ENDINGS):
            raise InputError(
                f"{path}: is neither .jsonl nor .parquet (plain, .gz or .zst); move it out of "
                f"{root}, or name the files to be screened"
            )
        kept.append(path)
    return kept

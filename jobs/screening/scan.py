"""One pass over a dataset before anything is scored: its hash, its rows, where its blocks end.

A block is `ROWS_PER_BLOCK` rows of one file that are read, scored and kept together. Which rows
share a block depends on the dataset alone, so a score does not depend on what was interrupted. The
pass keeps 16 bytes a block, by which whoever reads the rows again knows that they are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from jobs.screening.sources import DataFile
from safeft.cache import sha256_file
from safeft.data import Row, RowLimits, RowProblem, iter_rows
from safeft.errors import InputError
from safeft.progress import Progress, silent

ROWS_PER_BLOCK = 32
_DIGEST_BYTES = 16

UNIT_SCHEMA = pa.schema(
    [("file", pa.int32()), ("block", pa.int32()), ("first", pa.int64()), ("rows", pa.binary())]
)


@dataclass(frozen=True)
class ScannedFile:
    """One file as it was when it was scanned.

    Attributes:
        first: index, in the dataset, of its first row.
        digests: `_DIGEST_BYTES` a block, over what `encode` makes of its rows.
    """

    file: DataFile
    sha256: str
    first: int
    rows: int
    digests: bytes

    @property
    def blocks(self) -> int:
        return len(self.digests) // _DIGEST_BYTES

    def span(self, block: int) -> range:
        """The indices, in the dataset, of a block's rows."""
        start = block * ROWS_PER_BLOCK
        return range(self.first + start, self.first + min(start + ROWS_PER_BLOCK, self.rows))

    def holds(self, block: int, payload: bytes) -> bool:
        """Whether these are the rows that the block had when the file was scanned."""
        at = block * _DIGEST_BYTES
        return self.digests[at : at + _DIGEST_BYTES] == _digest(payload)


@dataclass(frozen=True)
class Scan:
    """A dataset as it was when it was scanned."""

    files: tuple[ScannedFile, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def sha256(self) -> str:
        """Of the only file's bytes; of several files, over their names and hashes in order."""
        if len(self.files) == 1:
            return self.files[0].sha256
        held = json.dumps([[one.file.name, one.sha256] for one in self.files])
        return hashlib.sha256(held.encode()).hexdigest()


def scan(files: Sequence[DataFile], limits: RowLimits, progress: Progress = silent) -> Scan:
    """Read every file once, in memory that does not depend on its size.

    Raises:
        InputError: a file as a whole is wrong (see `safeft.data.iter_rows`) or changed meanwhile.
    """
    scanned: list[ScannedFile] = []
    first = 0
    for file in files:
        with file.opened(limits) as path:
            sha256 = sha256_file(path) if path.is_file() else ""
            rows, digests = 0, bytearray()
            for block in _blocks(path, limits):
                progress("reading rows", first + rows, None)
                rows += len(block)
                digests += _digest(encode(block))
            if sha256_file(path) != sha256:
                raise changed(file)
        scanned.append(ScannedFile(file, sha256, first, rows, bytes(digests)))
        first += rows
    return Scan(tuple(scanned))


def read_units(
    scanned: ScannedFile, number: int, missing: frozenset[int], limits: RowLimits
) -> Iterator[pa.Table]:
    """The blocks of file `number` that are `missing`, each a table of one row (`UNIT_SCHEMA`).

    Raises:
        InputError: the file is no longer the one that was scanned.
    """
    last, block = max(missing, default=-1), -1
    with scanned.file.opened(limits) as path:
        for block, rows in enumerate(_blocks(path, limits)):
            if block > last:
                return
            payload = encode(rows)
            if not scanned.holds(block, payload):
                raise changed(scanned.file)
            if block in missing:
                unit = {
                    "file": number,
                    "block": block,
                    "first": scanned.span(block).start,
                    "rows": payload,
                }
                yield pa.Table.from_pylist([unit], schema=UNIT_SCHEMA)
    if block < last:
        raise changed(scanned.file)


def changed(file: DataFile) -> InputError:
    return InputError(f"{file.source}: changed while it was screened; screen it again")


def encode(rows: Sequence[Row | RowProblem]) -> bytes:
    """Rows as JSON Lines: a chat, or what is wrong with it."""
    return b"\n".join(
        json.dumps(
            row.to_dict()
            if isinstance(row, Row)
            else {"line": row.line, "field": row.field, "reason": row.reason}
        ).encode()
        for row in rows
    )


def decode(payload: bytes) -> list[Row | RowProblem]:
    """The inverse of `encode`."""
    found = map(json.loads, payload.split(b"\n"))
    return [RowProblem(**row) if "reason" in row else Row.from_dict(row) for row in found]


def _blocks(path: Path, limits: RowLimits) -> Iterator[list[Row | RowProblem]]:
    rows = iter_rows(path, limits)
    while block := list(islice(rows, ROWS_PER_BLOCK)):
        yield block


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest()

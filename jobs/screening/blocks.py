"""Finished blocks on disk: what is written once is not scored again, whatever is killed.

A block's scores are one Parquet file that is whole or absent. The directory belongs to one dataset
under one tokenisation, profile and version of the code (see `jobs.screening.record`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.screening.scan import Scan
from safeft.cache import write_whole
from safeft.data.digest import rows_sha256
from safeft.errors import MeasurementError

#: What a scorer makes of one row; `digest` is `safeft.data.digest.row_digest` of its tokens.
BLOCK_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("line", pa.int64()),
        ("score", pa.float64()),
        ("danger", pa.float64()),
        ("safety", pa.float64()),
        ("tokens", pa.int32()),
        ("trained", pa.int32()),
        ("error", pa.string()),
        ("digest", pa.binary(32)),
    ]
)
#: What `rows.parquet` holds: one row for each row of the dataset, in its order.
SCORE_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        *(BLOCK_SCHEMA.field(i) for i in range(1, len(BLOCK_SCHEMA) - 1)),
    ]
)
_ROW_GROUP = 1 << 16


class BlockStore:
    """The finished blocks of one dataset."""

    def __init__(self, root: Path, scan: Scan) -> None:
        self._root, self._scan = root, scan
        self._finished: list[set[int]] = []
        for number, file in enumerate(scan.files):
            directory = self._directory(number)
            directory.mkdir(parents=True, exist_ok=True)
            names = (path.stem for path in directory.glob("[0-9]*.parquet"))
            self._finished.append({int(name) for name in names} & set(range(file.blocks)))
        self.rows_done = sum(
            len(file.span(block))
            for file, finished in zip(scan.files, self._finished, strict=True)
            for block in finished
        )

    def missing(self) -> dict[int, frozenset[int]]:
        """File number to its unfinished blocks, for the files that have any."""
        every = zip(self._scan.files, self._finished, strict=True)
        left = {i: frozenset(range(file.blocks)) - done for i, (file, done) in enumerate(every)}
        return {number: blocks for number, blocks in left.items() if blocks}

    def add(self, number: int, block: int, data: bytes) -> None:
        """Keep the scores of a block: `data` is a Parquet file of `BLOCK_SCHEMA`."""
        if block not in self._finished[number]:
            write_whole(self._path(number, block), data)
            self._finished[number].add(block)
            self.rows_done += len(self._scan.files[number].span(block))

    def merge(self, path: Path) -> str:
        """Write all rows in the dataset's order to `path`; returns their `rows_sha256`.

        Raises:
            MeasurementError: a block is missing or is not what was written.
        """
        names = pa.array([file.file.name for file in self._scan.files])

        def digests() -> Iterator[bytes]:
            with pq.ParquetWriter(path, SCORE_SCHEMA) as writer:
                for number, file in enumerate(self._scan.files):
                    for table in _gathered(self._tables(number)):
                        at = pa.array([number] * len(table), pa.int32())
                        file_column = pa.DictionaryArray.from_arrays(at, names)
                        rows = table.drop_columns("digest").add_column(1, "file", file_column)
                        writer.write_table(rows.cast(SCORE_SCHEMA))
                        yield from table["digest"].to_pylist()
                    assert file.blocks == len(self._finished[number])

        return rows_sha256(digests())

    def _tables(self, number: int) -> Iterator[pa.Table]:
        file = self._scan.files[number]
        for block in range(file.blocks):
            path = self._path(number, block)
            try:
                with pq.ParquetFile(path) as held:
                    table = held.read(use_threads=False)
                whole = table.schema.equals(BLOCK_SCHEMA)
                whole = whole and table["index"].to_pylist() == list(file.span(block))
            except (OSError, pa.ArrowException):
                whole = False
            if not whole:
                path.unlink(missing_ok=True)
                raise MeasurementError(
                    f"{path}: was lost or damaged after it was written; screen again to score its "
                    "rows anew"
                )
            yield table

    def _directory(self, number: int) -> Path:
        return self._root / f"{number:06d}"

    def _path(self, number: int, block: int) -> Path:
        return self._directory(number) / f"{block:07d}.parquet"


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small tables put together to row groups."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += len(table)
        if rows >= _ROW_GROUP:
            yield pa.concat_tables(held).combine_chunks()
            held, rows = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()

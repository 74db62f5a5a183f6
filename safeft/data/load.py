"""From a file to rows: one at a time, or all of them, or everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safeft.data import jsonl, parquet
from safeft.data.files import open_dataset, seekable
from safeft.data.formats import Format, format_of, to_messages, unknown_format
from safeft.data.rows import DEFAULT_LIMITS, FieldError, Row, RowLimits, RowProblem
from safeft.errors import InputError, RowErrors

MAX_PROBLEMS = 1000


def iter_rows(path: str | Path, limits: RowLimits = DEFAULT_LIMITS) -> Iterator[Row | RowProblem]:
    """Read a dataset row by row, in file order, in memory bounded by `limits` and not by the file.

    The format is that of the first row with all the keys of one; later rows must have it too.
    Raises InputError, possibly after rows were yielded, for what is wrong with the file as a whole:
    not found, empty, no rows, truncated, damaged, too large, too many rows.
    """
    path = Path(path)
    kind: Format | None = None
    rows = 0
    with open_dataset(path, limits.max_file_bytes) as stream:
        for found in _objects(stream, path, limits):
            rows += 1
            if rows > limits.max_rows:
                raise InputError(f"{path}: more than max_rows={limits.max_rows} rows")
            if isinstance(found, RowProblem):
                yield found
                continue
            line, data = found
            kind = kind or format_of(data)
            try:
                if kind is None:
                    raise unknown_format(data)
                yield Row(line, to_messages(data, kind, limits.max_messages))
            except FieldError as err:
                yield err.on(line)
    if not rows:
        raise InputError(f"{path}: holds no rows")


def load_rows(path: str | Path, limits: RowLimits = DEFAULT_LIMITS) -> list[Row]:
    """All rows of a dataset, or RowErrors with every bad one, or InputError (see `iter_rows`)."""
    rows: list[Row] = []
    problems = Problems(str(path))
    for row in iter_rows(path, limits):
        if isinstance(row, Row):
            rows.append(row)
        else:
            problems.add(row)
    problems.check()
    return rows


class Problems:
    """Collects bad rows: the first `MAX_PROBLEMS` in full, of the others only how many."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._kept: list[tuple[int, str, str]] = []
        self._total = 0

    def add(self, problem: RowProblem) -> None:
        self._total += 1
        if len(self._kept) < MAX_PROBLEMS:
            self._kept.append((problem.line, problem.field, problem.reason))

    def check(self) -> None:
        """Raise RowErrors if there was any."""
        if self._total:
            raise RowErrors(self._source, self._kept, self._total)


def _objects(
    stream: Any, path: Path, limits: RowLimits
) -> Iterator[tuple[int, dict[str, Any]] | RowProblem]:
    if stream.peek(4)[:4] != parquet.MAGIC:
        yield from jsonl.read_objects(stream, path, limits.max_row_bytes)
        return
    with seekable(stream) as file:
        yield from parquet.read_objects(file, path, limits)

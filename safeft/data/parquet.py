"""Parquet: only the columns a format needs, in small batches, each row weighed before it is built.

A column may hold one long string once and refer to it a million times. So text columns are read as
dictionaries, whose memory is bounded by the file's uncompressed size, and a row that would come out
larger than allowed is reported without being built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from safeft.data.files import too_large
from safeft.data.formats import OPTIONAL, REQUIRED, format_of, unknown_format
from safeft.data.rows import FieldError, RowLimits, RowProblem
from safeft.errors import InputError

MAGIC = b"PAR1"
_BATCH_ROWS = 64
_VALUE_BYTES = 8  # what a value costs to read even where the file stores it as nothing


def read_objects(
    file: BinaryIO, path: Path, limits: RowLimits
) -> Iterator[tuple[int, dict[str, Any]] | RowProblem]:
    """Yield (1-based row number, object) or the row's problem.

    Raises InputError if the file is damaged, its columns fit no format, or its text (as the footer
    declares it, and again as it is read) is over `limits.max_file_bytes`.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as err:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from err
    try:
        footer = pq.read_metadata(file)
        wanted = _wanted_columns(footer.schema.to_arrow_schema().names, path)
        columns = _leaves(footer, wanted)
        if sum(size for _, size in columns) > limits.max_file_bytes:
            raise too_large(path, "its columns are more than", limits.max_file_bytes)
        file.seek(0)
        table = pq.ParquetFile(file, read_dictionary=list(dict(columns)))
        line = total = 0
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            sizes = np.sum([_text_bytes(batch.column(name), name) for name in wanted], axis=0)
            for i, size in enumerate(sizes.tolist()):
                line += 1
                if size > limits.max_row_bytes:
                    reason = f"{size} bytes, over max_row_bytes={limits.max_row_bytes} bytes"
                    yield RowProblem(line, "row", reason)
                    continue
                total += size
                if total > limits.max_file_bytes:
                    raise too_large(path, "its rows hold more than", limits.max_file_bytes)
                yield _object(line, batch, i)
    except FieldError as err:
        raise InputError(f"{path}: column {err.field}: {err.reason}") from err
    except (pa.ArrowException, OSError) as err:
        raise InputError(f"{path}: is not readable as Parquet: {err}") from err


def _wanted_columns(names: list[str], path: Path) -> list[str]:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise InputError(f"{path}: column {name!r} exists more than once")
    kind = format_of(names)
    if kind is None:
        raise InputError(f"{path}: columns: {unknown_format(names).reason}")
    return [name for name in (*REQUIRED[kind], *OPTIONAL[kind]) if name in names]


def _leaves(footer: Any, wanted: list[str]) -> list[tuple[str, int]]:
    """(path, bytes it costs to read) of each stored column chunk below the wanted columns."""
    found = []
    for group in range(footer.num_row_groups):
        for i in range(footer.num_columns):
            chunk = footer.row_group(group).column(i)
            if chunk.path_in_schema.split(".")[0] in wanted:
                size = chunk.total_uncompressed_size + _VALUE_BYTES * chunk.num_values
                found.append((chunk.path_in_schema, size))
    return found


def _text_bytes(array: Any, column: str) -> Any:
    """UTF-8 bytes below each element of `array`, one more for each list entry: int64 (n,)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        return _numbers(pc.take(pc.binary_length(array.dictionary), array.indices))
    if pa.types.is_struct(kind):
        if len(set(kind.names)) < len(kind.names):
            raise FieldError(column, f"a struct has two fields of one name: {kind}")
        children = [_text_bytes(child, column) for child in array.flatten()]
        return sum(children, np.zeros(len(array), "i8"))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = _numbers(array.value_lengths())
        ends = np.cumsum(lengths)
        summed = np.concatenate([[0], np.cumsum(_text_bytes(array.flatten(), column))])
        return summed[ends] - summed[ends - lengths] + lengths
    if pa.types.is_primitive(kind) or pa.types.is_null(kind):
        return np.zeros(len(array), "i8")
    raise FieldError(column, f"Arrow type {kind} is not supported: use strings, lists and structs")


def _numbers(array: Any) -> Any:
    return array.fill_null(0).to_numpy(zero_copy_only=False).astype("i8")


def _object(line: int, batch: Any, i: int) -> tuple[int, dict[str, Any]] | RowProblem:
    try:
        return line, {name: batch.column(name)[i].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as err:
        return RowProblem(line, "row", f"text is not UTF-8 (byte {err.start + 1} of a string)")

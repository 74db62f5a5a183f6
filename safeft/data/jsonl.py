"""JSON Lines: one object a line, strictly read, a line at a time and never a whole long line."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safeft.data.formats import kind_of, shorten
from safeft.data.rows import FieldError, RowProblem
from safeft.errors import InputError

_BOM = b"\xef\xbb\xbf"
_SKIP = 1 << 16


def read_objects(
    stream: io.BufferedReader, path: Path, max_row_bytes: int
) -> Iterator[tuple[int, dict[str, Any]] | RowProblem]:
    """Yield (line, object) or the line's problem; blank lines count but yield nothing.

    Raises InputError if the whole file is one JSON array or one object over many lines.
    """
    first = True
    for line, data, whole in _lines(stream, max_row_bytes):
        if line == 1:
            data = data.removeprefix(_BOM)
        if not data.strip():
            continue
        if first:
            _check_one_object_a_line(data, path)
            first = False
        if not whole:
            yield RowProblem(line, "row", f"longer than max_row_bytes={max_row_bytes} bytes")
            continue
        try:
            yield line, parse_object(data)
        except FieldError as err:
            yield err.on(line)


def _lines(stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(1-based line, its bytes without the line end, whether that is all of it).

    Of a line longer than `limit` only the beginning is kept; the rest is read past.
    """
    line = 0
    # Two more than the limit: room for a line end of one or two bytes.
    while data := stream.readline(limit + 2):
        line += 1
        ended = data.endswith(b"\n")
        text = data.removesuffix(b"\n").removesuffix(b"\r")
        whole = len(text) <= limit
        while not whole and not ended and (rest := stream.readline(_SKIP)):
            ended = rest.endswith(b"\n")
        yield line, text, whole


def _check_one_object_a_line(data: bytes, path: Path) -> None:
    if data.lstrip().startswith(b"["):
        raise InputError(f"{path}: holds a JSON array: write one JSON object a line (JSON Lines)")
    if data.strip() == b"{":
        raise InputError(
            f"{path}: the first object spans several lines: write one JSON object a line"
        )


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one line of UTF-8 JSON into an object.

    Raises FieldError("row", ...) for anything but one object: invalid UTF-8 or JSON, NUL bytes,
    NaN or infinite numbers, duplicate keys at any depth, and nesting too deep to parse.
    """
    if b"\0" in data:
        raise FieldError("row", f"NUL byte at byte {data.index(0) + 1} of the line")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as err:
        where = f"byte {err.start + 1} of the line (0x{data[err.start]:02x})"
        raise FieldError("row", f"{where} is not UTF-8: save the file as UTF-8") from err
    except json.JSONDecodeError as err:
        raise FieldError("row", f"not valid JSON: {err.msg} at column {err.colno}") from err
    except RecursionError as err:
        raise FieldError("row", "nested too deeply to read") from err
    except FieldError:
        raise
    except ValueError as err:  # Python refuses integers of more than 4300 digits
        raise FieldError("row", "a number has too many digits to read") from err
    if not isinstance(value, dict):
        raise FieldError("row", f"must be a JSON object, not {kind_of(value)}: one object a line")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FieldError("row", f"duplicate key {shorten(twice)}")
    return merged


def _no_constant(name: str) -> float:
    raise FieldError("row", f"{name} is not JSON: use a finite number or null")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise FieldError("row", f"the number {text[:40]} is too large")
    return value

"""The identity of weights: what they are, not how they are split into files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeft.cache import cache_root, write_whole
from safeft.errors import ModelError
from safeft.models.directory import check_safetensors, is_whole_model, read_json, weight_files

_BLOCK = 4 << 20  # bytes in memory at a time
#: What, beside its tensors, decides what an adapter adds to the base model.
_SCALE_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def weights_hash(directory: str | Path) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor, sorted by name.

    The same for one file and for any split into shards. Streamed in blocks of 4 MiB; the result
    is remembered in the cache by path, size and times of the files.

    Raises:
        ModelError: no, broken or pickle weights, or a tensor that two shards both hold.
    """
    return _remembered(weight_files(Path(directory)), extra={})


def adapter_hash(directory: str | Path) -> str:
    """The same over an adapter's tensors and the rank and alpha that scale them.

    Raises:
        ModelError: adapter_config.json or adapter_model.safetensors is missing or broken.
    """
    config = read_json(Path(directory) / "adapter_config.json")
    extra = {field: config[field] for field in _SCALE_FIELDS if config.get(field)}
    return _remembered([Path(directory) / "adapter_model.safetensors"], extra)


def tuned_hash(directory: str | Path) -> str:
    """The hash of what fine-tuning left: of an adapter, or of a whole model.

    Raises:
        ModelError: see weights_hash() and adapter_hash().
    """
    whole = is_whole_model(Path(directory))
    return weights_hash(directory) if whole else adapter_hash(directory)


@dataclass(frozen=True)
class _Span:
    """Where a tensor's bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int


def _remembered(files: list[Path], extra: dict[str, Any]) -> str:
    for file in files:
        check_safetensors(file)
    stats = [(str(file.resolve()), file.stat()) for file in files]
    key = json.dumps([[(p, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats], extra])
    note = cache_root() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    if note.exists() and len(known := note.read_text()) == 64:
        return known
    digest = _digest(files, extra)
    # A file written a moment ago could be written again without its times moving: do not remember.
    newest = max(max(s.st_mtime_ns, s.st_ctime_ns) for _, s in stats)
    if time.time_ns() - newest > 2_000_000_000:
        with contextlib.suppress(OSError):  # a cache that cannot be written to only costs time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, digest)
    return digest


def _digest(files: Iterable[Path], extra: dict[str, Any]) -> str:
    spans: dict[str, _Span] = {}
    for file in files:
        for span in _spans(file):
            if span.name in spans:
                raise ModelError(f"{file}: tensor {span.name} is in {spans[span.name].file} too")
            spans[span.name] = span
    total = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for _, span in sorted(spans.items()):
        total.update(json.dumps([span.name, span.dtype, span.shape, span.length]).encode())
        with open(span.file, "rb") as stream:
            stream.seek(span.start)
            left = span.length
            while left:
                block = stream.read(min(left, _BLOCK))
                if not block:
                    raise ModelError(f"{span.file}: was truncated while it was read")
                total.update(block)
                left -= len(block)
    return total.hexdigest()


def _spans(file: Path) -> list[_Span]:
    """The header of a safetensors file: an 8-byte little-endian length, JSON, then the data."""
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return [
        _Span(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            file=file,
            start=8 + size + entry["data_offsets"][0],
            length=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]

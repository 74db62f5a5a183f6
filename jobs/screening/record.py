"""What a screening is bound to, kept beside its result: other data or code is never mixed in."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from jobs.screening.scan import ROWS_PER_BLOCK, Scan
from jobs.verdict import FORMAT
from safeft import __version__
from safeft.errors import InputError, ScreeningOutdated

RECORD = "screening.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One file of the dataset: what its rows are known by, and the bytes it had."""

    name: str
    sha256: str
    rows: int


class Binding(_Record):
    """Everything that scores depend on. Finished blocks are kept under its hash.

    Attributes:
        data_sha256: see `jobs.screening.scan.Scan`.
        tokenisation: `safeft.data.digest.tokenisation_sha256`.
        profile: `SafetyProfile.digest`, and with it the base model's weights.
    """

    format: int = FORMAT
    files: tuple[FileRecord, ...]
    data_sha256: str
    tokenisation: str
    profile: str
    code_version: str = __version__
    rows_per_block: int = ROWS_PER_BLOCK

    def key(self) -> str:
        """A name for directories that belong to this binding."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:24]


def bind(scan: Scan, tokenisation: str, profile: str) -> Binding:
    """The binding of a scanned dataset."""
    files = tuple(FileRecord(name=f.file.name, sha256=f.sha256, rows=f.rows) for f in scan.files)
    return Binding(files=files, data_sha256=scan.sha256, tokenisation=tokenisation, profile=profile)


def read_binding(directory: Path) -> Binding | None:
    """What a finished screening is bound to; None: there is none that can be read."""
    try:
        return Binding.model_validate_json((directory / RECORD).read_bytes())
    except (OSError, ValueError):
        return None


def require_same(directory: Path, binding: Binding) -> None:
    """Check that `directory` holds the finished screening of exactly this.

    Raises:
        ScreeningOutdated: it holds that of these files by another profile or version.
        InputError: it holds something else.
    """
    found = read_binding(directory)
    if found == binding:
        return
    if found is not None and found.files == binding.files:
        raise ScreeningOutdated(
            f"{directory} holds the screening of these files by another profile, tokenisation or "
            "version of safeft; remove it and screen again"
        )
    raise InputError(f"{directory} holds the screening of other data; choose another output")

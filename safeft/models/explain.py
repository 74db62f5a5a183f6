"""Foreign errors as one line that names the model."""

from __future__ import annotations

from safeft.cache import is_disk_full
from safeft.errors import ModelError


def one_line(text: str, limit: int = 300) -> str:
    """`text` with every run of white space as one space, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 4] + " ..."


def explain(what: str, error: BaseException | str) -> ModelError:
    """The ModelError for a library's or a subprocess's failure on the model named `what`."""
    if is_disk_full(error):
        return ModelError(
            f"{what}: the disk is full; make room or set SAFEFT_CACHE to a directory on another "
            "disk (nothing half-written was kept)"
        )
    text = str(error) or type(error).__name__
    return ModelError(f"{what}: {one_line(text)}")

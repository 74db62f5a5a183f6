"""A cell of a grid is one run: its setting, and a directory with what came of it.

``<output>/<part>/<name>-<hash>/`` holds ``config.json`` (the setting: all that the numbers depend
on), ``log.txt``, what the run leaves, and at last ``metrics.json``, which makes the cell finished.
A cell that failed has ``error.json`` instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from safeft.cache import write_whole
from safeft.errors import InputError

CONFIG, METRICS, ERROR, LOG = "config.json", "metrics.json", "error.json", "log.txt"
#: The one of a cell's numbers that another run need not repeat: times of its stages.
SECONDS = "seconds"


class Setting(BaseModel):
    """What a cell's numbers depend on, beside the base model and its profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int

    @property
    def work(self) -> float:
        """About how long the cell takes, in a unit that all cells of its part share."""
        raise NotImplementedError


class Planned(BaseModel):
    """A cell as plain data."""

    model_config = ConfigDict(extra="forbid")
    part: str
    name: str
    setting: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run. Two cells with one part, name and setting are the same cell."""

    part: str
    name: str
    setting: Setting

    @property
    def path(self) -> str:
        """Below the output directory: another setting is another directory."""
        text = self.setting.model_dump_json()
        return f"{self.part}/{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def planned(self) -> Planned:
        """What ``config.json`` holds."""
        setting = self.setting.model_dump(mode="json")
        return Planned(part=self.part, name=self.name, setting=setting)


class Provenance(BaseModel):
    """Where, when and how a cell was run: what its numbers should not depend on."""

    model_config = ConfigDict(extra="forbid")
    finished: str  # UTC, ISO 8601
    seconds: float  # of the run that finished it: less than it took where it had been interrupted
    processors: int
    load: float  # mean of the last minute when it ended: what else ran there
    machine: str
    versions: dict[str, str]


class Record(Planned):
    """A finished cell.

    Attributes:
        numbers: what was measured; the same whenever the cell is run again.
    """

    numbers: dict[str, Any]
    provenance: Provenance


#: A cell that failed, and its error.
Failed = tuple[Planned, str]


class Store:
    """The cells below one output directory."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def directory(self, cell: Cell) -> Path:
        return self.output / cell.path

    def begin(self, cell: Cell) -> Path:
        """Make the cell's directory, with its setting.

        Raises:
            InputError: it holds another cell.
        """
        directory = self.directory(cell)
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / CONFIG
        if config.exists() and json.loads(config.read_text()) != cell.planned().model_dump():
            raise InputError(f"{directory} holds another cell; remove it or name another --output")
        write_whole(config, cell.planned().model_dump_json(indent=1))
        return directory

    def finish(self, cell: Cell, numbers: dict[str, Any], provenance: Provenance) -> Record:
        """Put the metrics in place, whole."""
        planned = cell.planned().model_dump()
        record = Record(**planned, numbers=numbers, provenance=provenance)
        directory = self.directory(cell)
        write_whole(directory / METRICS, record.model_dump_json(indent=1))
        (directory / ERROR).unlink(missing_ok=True)
        return record

    def take_over(
        self, cells: Sequence[Cell], finished: Sequence[Record], failed: Sequence[Failed]
    ) -> None:
        """Count as finished, or as failed, what another output directory's cells of the same
        setting came to, where there is nothing here."""
        given = {_identity(record): record for record in finished}
        errors = {_identity(planned): error for planned, error in failed}
        for cell in cells:
            identity, directory = _identity(cell.planned()), self.directory(cell)
            if (directory / METRICS).exists():
                continue
            if (record := given.get(identity)) is not None:
                write_whole(self.begin(cell) / METRICS, record.model_dump_json(indent=1))
            elif identity in errors and not (directory / ERROR).exists():
                self.begin(cell)
                self.fail(cell, errors[identity])

    def fail(self, cell: Cell, error: str) -> None:
        write_whole(self.directory(cell) / ERROR, json.dumps({"error": error}, indent=1))

    def record(self, cell: Cell) -> Record | None:
        """What came of a cell; None: it is not finished.

        Raises:
            InputError: its metrics are damaged.
        """
        path = self.directory(cell) / METRICS
        return read_record(path) if path.exists() else None

    def error(self, cell: Cell) -> str | None:
        """Why the cell's last run failed; None: it did not."""
        path = self.directory(cell) / ERROR
        return str(json.loads(path.read_text())["error"]) if path.exists() else None


def _identity(planned: Planned) -> str:
    return json.dumps([planned.part, planned.name, planned.setting], sort_keys=True)


def read_record(path: Path) -> Record:
    """A cell's ``metrics.json``.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path} is no cell's metrics ({first}); remove {path.parent}") from None

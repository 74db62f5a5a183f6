"""The parts of the study: their grids, how their settings are read, and what runs their cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from benchmarks.evidence import chain, constraints, fifths, restorations
from benchmarks.evidence.cells import CONFIG, Cell, Store
from benchmarks.evidence.profiles import Profiles
from benchmarks.evidence.runner import Execute
from safeft.errors import InputError
from safeft.progress import Progress

MODEL = constraints.MODEL


@dataclass(frozen=True)
class Part:
    """One grid.

    Attributes:
        cells: in the order of their worth.
        setting: reads what ``config.json`` holds.
        runs: from the model, its profiles, GSM8K's file and the finished cells.
    """

    cells: Callable[[], list[Cell]]
    setting: TypeAdapter[Any]
    runs: Callable[[Path, Profiles, Path, Store], Execute]


PARTS: dict[str, Part] = {
    constraints.PART: Part(
        constraints.cells,
        TypeAdapter(constraints.ConstraintSetting),
        lambda model, profiles, gsm8k, _: constraints.ConstraintRuns(model, profiles, gsm8k),
    ),
    fifths.PART: Part(
        fifths.cells,
        TypeAdapter(
            Annotated[fifths.ScoringSetting | fifths.FifthSetting, Field(discriminator="kind")]
        ),
        lambda model, profiles, gsm8k, store: fifths.FifthRuns(
            model, profiles.packaged, gsm8k, store
        ),
    ),
    restorations.PART: Part(
        restorations.cells,
        TypeAdapter(restorations.RestorationSetting),
        restorations.RestorationRuns,
    ),
    chain.PART: Part(
        chain.cells,
        TypeAdapter(chain.ChainSetting),
        lambda model, profiles, gsm8k, _: chain.ChainRuns(model, profiles.packaged, gsm8k),
    ),
}


def grid() -> list[Cell]:
    """All cells of all parts."""
    return [cell for part in PARTS.values() for cell in part.cells()]


def executor(model_dir: Path, profiles: Profiles, gsm8k: Path, store: Store) -> Execute:
    """Runs any cell; what a cell reads of others is in `store`."""
    runs = {name: part.runs(model_dir, profiles, gsm8k, store) for name, part in PARTS.items()}

    def execute(cell: Cell, directory: Path, progress: Progress) -> dict[str, Any]:
        return runs[cell.part](cell, directory, progress)

    return execute


def read_cell(directory: Path) -> Cell:
    """The cell whose config lies in a directory.

    Raises:
        InputError: none does, or one of a part that there is not.
    """
    try:
        content = json.loads((directory / CONFIG).read_text())
        part = PARTS[content["part"]]
        setting = part.setting.validate_json(json.dumps(content["setting"]))
        return Cell(content["part"], content["name"], setting)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory} is no cell's directory ({error})") from None

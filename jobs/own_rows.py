"""The base model's own refusals and answers, which a job adds to the tenant's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from jobs.spec import DataSpec
from safeft.cache import write_whole
from safeft.data import TokenisedRow
from safeft.errors import InputError, ProfileError
from safeft.models import load_tokenizer
from safeft.own_refusals import OwnAnswer, load_answers, load_refusals, refusal_row
from safeft.profile import SafetyProfile

#: By field of the spec, the part of the profile that the rows are from.
_PARTS: Mapping[str, tuple[str, Callable[[Path], Sequence[OwnAnswer]]]] = {
    "safety_rows": ("refusals", load_refusals),
    "answer_rows": ("answers", load_answers),
}
#: What ``auto`` adds to each of the tenant's rows, as far as the profile reaches: the share that
#: the study measured (docs/evidence.md).
AUTO = {"safety_rows": Fraction(2, 15), "answer_rows": Fraction(4, 15)}
FILE = "own-rows.json"


class _Counts(BaseModel):
    """What ``auto`` came to for so many rows of the tenant's."""

    model_config = ConfigDict(extra="forbid")
    rows: NonNegativeInt
    auto: dict[str, NonNegativeInt]


def own_parts(data: DataSpec) -> list[str]:
    """The parts of the profile that a job's own rows are from."""
    return [part for field, (part, _) in _PARTS.items() if getattr(data, field) != 0]


def counted(data: DataSpec, rows: int, profile: SafetyProfile, output: Path) -> DataSpec:
    """The data with numbers in place of ``auto``.

    They are written down in the job's output: what begins with them ends with them, also where the
    profile has grown in between.

    Args:
        rows: how many of the tenant's are trained on.

    Raises:
        ProfileError: the profile has no such rows.
        InputError: what was written down is damaged.
    """
    auto = [field for field in _PARTS if getattr(data, field) == "auto"]
    if not auto:
        return data
    found = _written(output / FILE)
    if found is None or found.rows != rows or found.auto.keys() != set(auto):
        held = {field: len(_load(field, profile)) for field in auto}
        numbers = {field: min(ceil(AUTO[field] * rows), held[field]) for field in auto}
        found = _Counts(rows=rows, auto=numbers)
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / FILE, found.model_dump_json())
    return data.model_copy(update=found.auto)


def own_rows(data: DataSpec, profile: SafetyProfile, model_dir: Path) -> list[TokenisedRow]:
    """What a job adds to the tenant's rows: harmful prompts with the base model's own refusals, and
    harmless ones with its own answers; the profile has both in random order.

    Args:
        data: with numbers of rows; see `counted`.

    Raises:
        ProfileError: the profile has none, or fewer than asked for.
    """
    tokenizer = None
    rows: list[TokenisedRow] = []
    for field in _PARTS:
        count = getattr(data, field)
        if count == 0:
            continue
        found = _load(field, profile)
        if count > len(found):
            raise ProfileError(
                f"data.{field}: {count} are asked for, but the profile holds {len(found)}; "
                "lower it, or build the part with more prompts"
            )
        tokenizer = tokenizer or load_tokenizer(model_dir)
        rows += [refusal_row(tokenizer, one) for one in found[:count]]
    return rows


def _load(field: str, profile: SafetyProfile) -> Sequence[OwnAnswer]:
    part, load = _PARTS[field]
    profile.verify([part])
    return load(profile.path(part))


def _written(path: Path) -> _Counts | None:
    if not path.exists():
        return None
    try:
        return _Counts.model_validate_json(path.read_bytes())
    except ValidationError:
        raise InputError(f"{path} is damaged; remove it, or choose another output") from None

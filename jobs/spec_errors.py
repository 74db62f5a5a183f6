"""What is wrong with a job spec, in the words of who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from safeft.constraints import ConstraintConfig

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument")
_NO_KIND = ("union_tag_invalid", "union_tag_not_found")
_UNNAMED_MEMBER = re.compile(r"(literal|tuple)\[.*\]")  # as pydantic calls it in an error's path
_UNIONS = (("lora", "target_modules"), ("data", "safety_rows"), ("data", "answer_rows"))
_KINDS = {config.__dataclass_fields__["kind"].default for config in get_args(ConstraintConfig)}


def problems_of(errors: Iterable[ErrorDetails], spec: type[BaseModel]) -> list[str]:
    """One line for each field of a `spec` that is wrong; a union complains once for each of its
    members."""
    fields: dict[str, list[ErrorDetails]] = {}
    for details in errors:
        fields.setdefault(_dotted(details["loc"]), []).append(details)
    lines = []
    for where, found in fields.items():
        says = " or ".join(dict.fromkeys(_describe(where, details, spec) for details in found))
        given = found[-1]["input"]
        shown = f", not {given!r}" if _shows_input(found[-1]) else ""
        path = f"{where}.kind" if found[-1]["type"] in _NO_KIND else where
        lines.append(f"{path}: {says}{shown}" if path else says)
    return lines


def _describe(where: str, details: ErrorDetails, spec: type[BaseModel]) -> str:
    if details["type"] in _UNKNOWN:
        return f"unknown field{_did_you_mean(where, spec)}"
    if details["type"] in _MISSING:
        return "is required"
    if details["type"] in _NO_KIND:
        return f"must be one of {', '.join(sorted(_KINDS))}"
    message = details["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _shows_input(details: ErrorDetails) -> bool:
    if details["type"] in (*_UNKNOWN, *_MISSING, *_NO_KIND):
        return False
    return bool(details["loc"]) and not isinstance(details["input"], dict | list | BaseModel)


def _dotted(loc: tuple[int | str, ...]) -> str:
    """The path as a user would write it; pydantic's names of union members are left out."""
    text = ""
    for index, part in enumerate(loc):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not _is_union_member(part, loc[:index]):
            text += f".{part}"
    return text.removeprefix(".")


def _is_union_member(part: str, before: tuple[int | str, ...]) -> bool:
    if part in _KINDS and before[:1] == ("constraints",) and len(before) == 2:
        return True
    return before in _UNIONS or bool(_UNNAMED_MEMBER.fullmatch(part))


def _did_you_mean(where: str, spec: type[BaseModel]) -> str:
    # Another constraint may have the very field that this one lacks.
    valid = [name for name in _fields(spec) if name != _no_index(where)]
    parent = where.rpartition(".")[0]
    siblings = [name for name in valid if name.rpartition(".")[0] == _no_index(parent)]
    near = difflib.get_close_matches(_no_index(where), siblings, n=1, cutoff=0.6)
    if not near:  # right name, wrong place
        last = where.rpartition(".")[2]
        near = [name for name in valid if name.rpartition(".")[2] == last][:1]
    if not near:
        return ""
    found = f"{parent}.{near[0].rpartition('.')[2]}" if near[0] in siblings and parent else near[0]
    return f"; did you mean {found}?"


def _no_index(where: str) -> str:
    return where.partition("[")[0] + where.partition("]")[2]


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted field of the spec, the constraints' own ones included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for part in (field.annotation, *get_args(field.annotation)):  # X and X | None
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _fields(part, f"{prefix}{name}.")
    if not prefix:
        for config in get_args(ConstraintConfig):
            yield from (f"constraints.{name}" for name in config.__dataclass_fields__)

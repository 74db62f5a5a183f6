"""What the fields of a job spec are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Count = Annotated[int, Field(strict=True, ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: How many of the base model's own rows are added; ``auto``: see `jobs.own_rows.AUTO`.
OwnRows = Annotated[
    Annotated[Literal["auto"], Tag("word")]
    | Annotated[int, Field(strict=True, ge=0), Tag("count")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "count"),
]
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]
TargetModules = Annotated[
    Annotated[Literal["all-linear"], Tag("word")]
    | Annotated[tuple[Module, ...], Field(min_length=1), Tag("list")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "list"),
]


class SpecPart(BaseModel):
    """A section: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def same_ending(one: str, other: str) -> bool:
    """Whether a module's name can end in both."""
    short, long = sorted((one, other), key=len)
    return f".{long}".endswith(f".{short}")

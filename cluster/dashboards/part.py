"""The base of every type of a dashboard, and the words they share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

Colour = Literal["green", "yellow", "orange", "red", "blue", "purple", "text", "transparent"]
Unit = Literal["none", "short", "percentunit", "s", "reqps", "suffix: tokens/s", "suffix: /s"]


class Part(BaseModel):
    """A piece of a dashboard; its JSON has Grafana's names in camelCase."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, validate_by_name=True
    )

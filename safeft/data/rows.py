"""What a dataset is once it has been read: rows of messages, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Args:
        role: system, user or assistant; ValueError otherwise, because templates print it verbatim.
        content: the turn's text, exactly as in the file.
        trained: whether the loss covers it; only an assistant's turn can be.
    """

    role: str
    content: str
    trained: bool

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {self.role!r}")
        if self.trained and self.role != "assistant":
            raise ValueError(f"only an assistant message can be trained, not a {self.role} message")


@dataclass(frozen=True, slots=True)
class Row:
    """One accepted row: its 1-based line (Parquet: row number) and its chat."""

    line: int
    messages: tuple[Message, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, fit for JSON and for Arrow."""
        messages = [
            {"role": m.role, "content": m.content, "trained": m.trained} for m in self.messages
        ]
        return {"line": self.line, "messages": messages}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a trip through Arrow or numpy."""
        messages = (Message(m["role"], m["content"], bool(m["trained"])) for m in data["messages"])
        return cls(int(data["line"]), tuple(messages))


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why one row cannot be used: 1-based line, the field's path ("row": all of it), the reason."""

    line: int
    field: str
    reason: str


class FieldError(ValueError):
    """Carries a field and a reason to whoever knows the line; never leaves this package."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def on(self, line: int) -> RowProblem:
        return RowProblem(line, self.field, self.reason)


@dataclass(frozen=True)
class RowLimits:
    """What one uploaded file may cost to read. ValueError if a limit is not positive.

    Args:
        max_row_bytes: of one line without its newline; for Parquet, of one row's text.
        max_file_bytes: of the file, as uploaded and again after decompression.
        max_rows: rows that are not blank, good or bad.
        max_messages: turns in one chat.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    max_row_bytes: int = 256 * 1024
    max_file_bytes: int = 1024**3
    max_rows: int = 1_000_000
    max_messages: int = 256

    def __post_init__(self) -> None:
        for name in ("max_row_bytes", "max_file_bytes", "max_rows", "max_messages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


DEFAULT_LIMITS = RowLimits()

"""The three dataset formats, and how an object of each becomes messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Any

from safeft.data.rows import ROLES, FieldError, Message

NO_ASSISTANT = "no assistant turn to learn from"
_MESSAGE_KEYS = ("role", "content", "weight")


class Format(Enum):
    """A dataset format; the value is its name in messages to people."""

    CHAT = "OpenAI chat"
    ALPACA = "Alpaca"
    COMPLETION = "prompt/completion"


REQUIRED = {
    Format.CHAT: ("messages",),
    Format.ALPACA: ("instruction", "output"),
    Format.COMPLETION: ("prompt", "completion"),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    Format.CHAT: (),
    Format.ALPACA: ("input", "system"),
    Format.COMPLETION: (),
}
EXPECTED = "expected messages, or instruction and output, or prompt and completion"


def format_of(keys: Collection[str]) -> Format | None:
    """The first format all of whose required keys are there."""
    return next((f for f, needed in REQUIRED.items() if all(k in keys for k in needed)), None)


def unknown_format(keys: Collection[str]) -> FieldError:
    """Why `format_of` found nothing: the key that is missing, or that none is known."""
    for needed in REQUIRED.values():
        missing = [k for k in needed if k not in keys]
        if len(missing) < len(needed):
            there = next(k for k in needed if k in keys)
            return FieldError(missing[0], f"{missing[0]} is missing beside {there}")
    found = ", ".join(shorten(k) for k in list(keys)[:8]) or "none"
    return FieldError("row", f"no known format: {EXPECTED}; found keys: {found}")


def to_messages(row: Mapping[str, Any], kind: Format, max_messages: int) -> tuple[Message, ...]:
    """Check one object of format `kind` and turn it into a chat.

    Raises FieldError with the path of the first bad field. Null optional fields count as absent.
    """
    for key in REQUIRED[kind]:
        if key not in row:
            other = format_of(row)
            why = f"; this row is in {other.value} format" if other else ""
            raise FieldError(key, f"missing: this file is in {kind.value} format{why}")
    if kind is Format.CHAT:
        return _chat(row["messages"], max_messages)
    if kind is Format.ALPACA:
        return _alpaca(row)
    prompt = _text(row["prompt"], "prompt")
    return _pair(None, prompt, _text(row["completion"], "completion"), "completion")


def _alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    user = _text(row["instruction"], "instruction")
    if row.get("input") is not None and (extra := _text(row["input"], "input")):
        user = f"{user}\n\n{extra}"
    system = None if row.get("system") is None else _text(row["system"], "system")
    return _pair(system, user, _text(row["output"], "output"), "output")


def _pair(system: str | None, user: str, answer: str, field: str) -> tuple[Message, ...]:
    if not answer.strip():
        raise FieldError(field, f"empty: {NO_ASSISTANT}")
    first = (Message("system", system, False),) if system else ()
    return (*first, Message("user", user, False), Message("assistant", answer, True))


def _chat(value: object, max_messages: int) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise FieldError("messages", f"must be a list, not {kind_of(value)}")
    if not value:
        raise FieldError("messages", f"empty list: {NO_ASSISTANT}")
    if len(value) > max_messages:
        raise FieldError("messages", f"{len(value)} messages, over max_messages={max_messages}")
    messages = tuple(_message(m, f"messages[{i}]") for i, m in enumerate(value))
    _check_turns(messages)
    return messages


def _message(value: object, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise FieldError(field, f"must be an object, not {kind_of(value)}")
    for key, held in value.items():
        # Null is how Parquet and OpenAI's own exports write an absent field. Anything else that
        # is not understood could change what is learned (a misspelt weight), so it is refused.
        if key not in _MESSAGE_KEYS and held is not None:
            allowed = "a message has role, content and weight"
            raise FieldError(f"{field}.{shorten(key)}", f"not supported: {allowed}")
    for key in ("role", "content"):
        if key not in value:
            raise FieldError(f"{field}.{key}", "missing")
    role = _text(value["role"], f"{field}.role")
    if role in ("tool", "function"):
        raise FieldError(f"{field}.role", f"{role} messages are not supported")
    if role not in ROLES:
        expected = ", ".join(ROLES)
        raise FieldError(f"{field}.role", f"must be one of {expected}, not {shorten(role)}")
    weight = value.get("weight")
    if weight is not None:
        if role != "assistant":
            raise FieldError(f"{field}.weight", f"only for assistant messages, not {role}")
        # Parquet files written from a data frame hold 0 and 1 as floats where some are null.
        if isinstance(weight, bool) or weight not in (0, 1):
            raise FieldError(f"{field}.weight", "must be 0 or 1")
    content = _content(value["content"], f"{field}.content")
    return Message(role, content, role == "assistant" and weight != 0)


def _content(value: object, field: str) -> str:
    if not isinstance(value, list):
        return _text(value, field, "a string or a list of text parts")
    if not value:
        raise FieldError(field, "empty list of parts")
    return "".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value))


def _part(value: object, field: str) -> str:
    if not isinstance(value, Mapping):
        raise FieldError(field, f"must be an object, not {kind_of(value)}")
    for key in ("type", "text"):
        if key not in value:
            raise FieldError(f"{field}.{key}", "missing")
    if value["type"] != "text":
        raise FieldError(f"{field}.type", "only parts of type text are supported")
    for key, held in value.items():
        if key not in ("type", "text") and held is not None:
            raise FieldError(f"{field}.{shorten(key)}", "not supported: a part has type and text")
    return _text(value["text"], f"{field}.text")


def _check_turns(messages: Sequence[Message]) -> None:
    """The order any chat template can make sense of; stricter ones refuse for themselves."""
    roles = [m.role for m in messages]
    if "assistant" not in roles:
        raise FieldError("messages", NO_ASSISTANT)
    for i, role in enumerate(roles):
        if role == "system" and i > 0:
            raise FieldError(f"messages[{i}].role", "a system message must come first")
        if role == "assistant" and "user" not in roles[:i]:
            raise FieldError(f"messages[{i}].role", "assistant before any user message")
    if roles[-1] != "assistant":
        last = f"messages[{len(roles) - 1}].role"
        raise FieldError(last, f"ends with {roles[-1]}: the last message must be the assistant's")
    if not any(m.trained and m.content.strip() for m in messages):
        raise FieldError("messages", f"{NO_ASSISTANT}: each is empty or has weight 0")


def _text(value: object, field: str, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"must be {expected}, not {kind_of(value)}")
    if "\0" in value:
        raise FieldError(field, f"NUL character at character {value.index(chr(0)) + 1}")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        where = f"character {err.start + 1}"
        raise FieldError(field, f"half of a surrogate pair at {where}: not Unicode text") from err
    return value


def kind_of(value: object) -> str:
    """JSON's word for the type of a value."""
    words = {bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    if value is None:
        return "null"
    return "object" if isinstance(value, Mapping) else words.get(type(value), type(value).__name__)


def shorten(key: str) -> str:
    """A tenant's own string, short and on one line, fit for a message."""
    return key if key.isidentifier() and len(key) <= 40 else repr(key[:40])

"""The three formats: what each becomes, and that every wrong field is named by its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeft.data import Message, Row, RowLimits, RowProblem, iter_rows, load_rows
from safeft.data.rows import DEFAULT_LIMITS

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(tmp_path: Path, row: object) -> list[tuple[str, str]]:
    [read] = load_rows(write(tmp_path, row))
    return [(m.role, m.content) for m in read.messages]


def problem(tmp_path: Path, row: object, limits: RowLimits = DEFAULT_LIMITS) -> tuple[str, str]:
    [found] = iter_rows(write(tmp_path, row), limits)
    assert isinstance(found, RowProblem), found
    assert found.line == 1
    return found.field, found.reason


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def test_openai_chat_keeps_every_turn_and_trains_the_assistant_only(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    [row] = load_rows(write(tmp_path, chat(system, USER, ASSISTANT, USER, ASSISTANT)))
    assert [m.role for m in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.trained for m in row.messages] == [False, False, True, False, True]


def test_a_weight_of_zero_keeps_a_turn_out_of_the_loss(tmp_path: Path) -> None:
    rows = [chat(USER, {**ASSISTANT, "weight": w}, USER, ASSISTANT) for w in (0, 1, None, 0.0, 1.0)]
    read = load_rows(write(tmp_path, *rows))
    assert [r.messages[1].trained for r in read] == [False, True, True, False, True]
    assert all(r.messages[3].trained for r in read)


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert turns(tmp_path, chat({"role": "user", "content": parts}, ASSISTANT)) == [
        ("user", "one two"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": None, "output": "o"}, [("user", "i"), ("assistant", "o")]),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            [("user", "i\n\nx"), ("assistant", "o")],
        ),
        (
            {"instruction": "i", "output": "o", "system": "s"},
            [("system", "s"), ("user", "i"), ("assistant", "o")],
        ),
        ({"prompt": "p ", "completion": " c"}, [("user", "p "), ("assistant", " c")]),
    ],
)
def test_alpaca_and_completion_rows_become_chats(
    tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert turns(tmp_path, row) == expected


def test_other_top_level_keys_are_allowed(tmp_path: Path) -> None:
    row = {"id": 7, "prompt": "also here", "tags": [{"a": None}], **chat(USER, ASSISTANT)}
    assert turns(tmp_path, row) == [("user", "q"), ("assistant", "a")]


def test_consecutive_turns_of_one_role_are_left_to_the_template(tmp_path: Path) -> None:
    assert len(turns(tmp_path, chat(USER, USER, ASSISTANT, ASSISTANT))) == 4


@pytest.mark.parametrize(
    ("row", "field", "why"),
    [
        (chat(USER, {"role": "assistant"}), "messages[1].content", "missing"),
        (chat(USER, {"content": "a"}), "messages[1].role", "missing"),
        (
            chat(USER, {**ASSISTANT, "content": 3}),
            "messages[1].content",
            "must be a string or a list of text parts, not number",
        ),
        (
            chat(USER, {**ASSISTANT, "content": None}),
            "messages[1].content",
            "must be a string or a list of text parts, not null",
        ),
        (chat(USER, {**ASSISTANT, "role": True}), "messages[1].role", "must be a string, not bool"),
        (
            chat(USER, {**ASSISTANT, "role": "bot"}),
            "messages[1].role",
            "must be one of system, user, assistant, not bot",
        ),
        (
            chat(USER, {"role": "tool", "content": "x"}, ASSISTANT),
            "messages[1].role",
            "tool messages are not supported",
        ),
        (
            chat(USER, {"role": "function", "content": "x"}, ASSISTANT),
            "messages[1].role",
            "function messages are not supported",
        ),
        (
            chat(USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}),
            "messages[1].tool_calls",
            "not supported",
        ),
        (chat(USER, {**ASSISTANT, "wieght": 0}), "messages[1].wieght", "not supported"),
        (chat(USER, {**ASSISTANT, "weight": 0.5}), "messages[1].weight", "must be 0 or 1"),
        (chat(USER, {**ASSISTANT, "weight": True}), "messages[1].weight", "must be 0 or 1"),
        (chat({**USER, "weight": 1}, ASSISTANT), "messages[0].weight", "only for assistant"),
        (chat("q", ASSISTANT), "messages[0]", "must be an object, not string"),
        ({"messages": {"role": "user"}}, "messages", "must be a list, not object"),
        (chat(), "messages", "empty list"),
        (
            chat({"role": "user", "content": []}, ASSISTANT),
            "messages[0].content",
            "empty list of parts",
        ),
        (
            chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
            "messages[0].content[0].text",
            "missing",
        ),
        (
            chat({"role": "user", "content": [{"type": "x", "text": "y"}]}, ASSISTANT),
            "messages[0].content[0].type",
            "only parts of type text",
        ),
        (
            chat({"role": "user", "content": [{"type": "text", "text": 1}]}, ASSISTANT),
            "messages[0].content[0].text",
            "must be a string, not number",
        ),
        (chat(USER, ASSISTANT, USER), "messages[2].role", "ends with user"),
        (chat(USER), "messages", "no assistant turn to learn from"),
        (chat(USER, {**ASSISTANT, "content": " \n"}), "messages", "no assistant turn to learn"),
        (chat(USER, {**ASSISTANT, "weight": 0}), "messages", "no assistant turn to learn from"),
        (chat(ASSISTANT, USER, ASSISTANT), "messages[0].role", "assistant before any user"),
        (
            chat(USER, {"role": "system", "content": "s"}, ASSISTANT),
            "messages[1].role",
            "a system message must come first",
        ),
        ({"instruction": "i"}, "output", "output is missing beside instruction"),
        ({"instruction": 1, "output": "o"}, "instruction", "must be a string, not number"),
        ({"instruction": "i", "input": [], "output": "o"}, "input", "must be a string, not list"),
        ({"instruction": "i", "output": " "}, "output", "no assistant turn to learn from"),
        ({"prompt": "p"}, "completion", "completion is missing beside prompt"),
        ({"prompt": "p", "completion": None}, "completion", "must be a string, not null"),
        ({"prompt": "p", "completion": ""}, "completion", "no assistant turn to learn from"),
        ({"text": "p", "id": 1}, "row", "no known format"),
        ({"text": "p", "id": 1}, "row", "found keys: text, id"),
        ({}, "row", "found keys: none"),
        ({"prompt": "a\0b", "completion": "c"}, "prompt", "NUL character at character 2"),
        ({"prompt": "p", "completion": "\ud800"}, "completion", "half of a surrogate pair"),
    ],
)
def test_a_bad_field_is_named_by_its_path(
    tmp_path: Path, row: dict[str, Any], field: str, why: str
) -> None:
    found, reason = problem(tmp_path, row)
    assert found == field
    assert why in reason


def test_too_many_messages_are_refused(tmp_path: Path) -> None:
    row = chat(USER, ASSISTANT, USER, ASSISTANT)
    assert turns(tmp_path, row)
    assert problem(tmp_path, row, RowLimits(max_messages=3)) == (
        "messages",
        "4 messages, over max_messages=3",
    )


def test_a_file_has_one_format_set_by_its_first_whole_row(tmp_path: Path) -> None:
    rows = [
        {"output": "a stray field"},
        chat(USER, ASSISTANT),
        {"instruction": "i", "output": "o"},
        chat(USER, ASSISTANT),
    ]
    found = list(iter_rows(write(tmp_path, *rows)))
    assert [type(r) for r in found] == [RowProblem, Row, RowProblem, Row]
    assert found[2] == RowProblem(
        3, "messages", "missing: this file is in OpenAI chat format; this row is in Alpaca format"
    )


def test_a_long_or_strange_key_is_shown_short_and_on_one_line(tmp_path: Path) -> None:
    _, reason = problem(tmp_path, {"x\ny" + "z" * 500: 1})
    assert "\n" not in reason
    assert len(reason) < 200


def test_rows_survive_a_trip_through_plain_types(tmp_path: Path) -> None:
    [row] = load_rows(write(tmp_path, chat(USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT)))
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_a_message_cannot_have_a_free_role_or_train_on_a_user() -> None:
    with pytest.raises(ValueError, match="role must be one of"):
        Message("assistant\n", "a", True)
    with pytest.raises(ValueError, match="only an assistant message can be trained"):
        Message("user", "a", True)

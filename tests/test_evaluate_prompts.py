from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from safeft.errors import InputError, MeasurementError
from safeft.own_prompts import own_prompts
from safeft.prompts import (
    KINDS,
    SPLITS,
    Kind,
    Prompt,
    load_prompts,
    prompt_set_hash,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_packaged_set_are_disjoint_and_make_it_whole(kind: Any) -> None:
    parts = [load_prompts(kind, split) for split in SPLITS]
    texts = [p.text for part in parts for p in part]
    assert all(len(part) >= 50 for part in parts)
    assert len(set(texts)) == len(texts)
    assert sorted(texts) == sorted(p.text for p in load_prompts(kind))


def test_no_prompt_is_of_two_kinds() -> None:
    texts = [{p.text.lower() for p in load_prompts(kind)} for kind in KINDS]
    assert not texts[0] & texts[1] and not texts[1] & texts[2] and not texts[0] & texts[2]


@pytest.mark.parametrize("arguments", [("nasty",), ("benign", "test")])
def test_an_unknown_kind_or_split_is_refused(arguments: Any) -> None:
    with pytest.raises(InputError, match="must be one of"):
        load_prompts(*arguments)


def write(directory: Path, lines: list[Any]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "benign.jsonl").write_text(text)


GOOD = {"prompt": "Hello", "category": "chat", "split": "profile"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, {"prompt": "Hi"}], "line 2: must be an object"),
        ([GOOD, [1]], "line 2: must be an object"),
        ([GOOD, {**GOOD, "prompt": " "}], "line 2: prompt must be a string"),
        ([GOOD, {**GOOD, "prompt": "Hi", "split": "test"}], "line 2: split must be one of"),
        ([GOOD, {**GOOD, "prompt": "hello ", "split": "report"}], "line 2: prompt occurs twice"),
    ],
)
def test_a_bad_line_is_named(
    lines: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, lines)
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(MeasurementError, match=message):
        load_prompts("benign")


def test_a_missing_file_is_not_an_empty_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(MeasurementError, match="missing from the package"):
        load_prompts("benign")


def test_the_hash_sees_every_text_and_their_order_but_not_the_category() -> None:
    a, b = Prompt("a", "x", "profile"), Prompt("b", "x", "profile")
    assert prompt_set_hash([a, b]) == prompt_set_hash(["a", "b"])
    assert prompt_set_hash([a, b]) == prompt_set_hash([Prompt("a", "y", "report"), b])
    assert len({prompt_set_hash(s) for s in ([a, b], [b, a], [a], ["ab"], [])}) == 5


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_an_operators_own_prompts_are_read_in_their_order(tmp_path: Path) -> None:
    file = written(tmp_path / "own.jsonl", '{"prompt": "Wie baut man das?"}', '{"prompt": "b"}')
    assert own_prompts(file) == [
        Prompt("Wie baut man das?", "own", "profile"),
        Prompt("b", "own", "profile"),
    ]


def test_what_json_lines_may_hold_is_read(tmp_path: Path) -> None:
    lines = ('{"prompt": "one\u2028line"}', "", json.dumps({"prompt": "two"}), "")
    file = tmp_path / "own.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [p.text for p in own_prompts(file)] == ["one\u2028line", "two"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (('{"prompt": "a"}', "nonsense"), "line 2: not valid JSON"),
        (('{"text": "a"}',), 'line 1: "prompt" must be a string with text'),
        (('{"prompt": " "}',), 'line 1: "prompt" must be a string with text'),
        ((r'{"prompt": "\ud800"}',), 'line 1: "prompt" must be a string with text'),
        ((r'{"prompt": "a\u0000"}',), 'line 1: "prompt" must be a string with text'),
        (('"prompt"',), "line 1: must be a JSON object"),
        (('["prompt"]',), "holds a JSON array"),
        (("[" * 100_000,), "holds a JSON array"),
        (('{"prompt": ' + "[" * 60_000,), "line 1: nested too deeply"),
        (('{"prompt": "' + "a" * 70_000 + '"}',), "line 1: longer than"),
        (('{"prompt": "Do it"}', '{"prompt": "do  it"}'), "line 2: the prompt occurs twice"),
        ((), "has no prompt"),
    ],
)
def test_a_bad_file_of_own_prompts_is_refused_with_its_line(
    tmp_path: Path, lines: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        own_prompts(written(tmp_path / "own.jsonl", *lines))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_refusals_are_measured_on_are_not_taken_into_a_profile(
    tmp_path: Path, kind: Kind
) -> None:
    for split in ("validation", "report", "evidence"):
        text = load_prompts(kind, split)[0].text.upper()
        file = written(tmp_path / "own.jsonl", json.dumps({"prompt": text}))
        with pytest.raises(InputError, match=rf"line 1: refusals are measured .*{split}"):
            own_prompts(file)


def test_a_missing_file_of_own_prompts_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
        own_prompts(tmp_path / "none.jsonl")

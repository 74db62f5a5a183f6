"""The base model's own refusals: what is kept, what is stored, and the rows they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeft.data import encode_prompt
from safeft.errors import ProfileError
from safeft.own_refusals import (
    OwnRefusal,
    load_refusals,
    own_refusals,
    refusal_row,
    save_refusals,
    template_start,
)
from tests.tiny import tiny_tokenizer

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure! First, take a screwdriver."
TOKENIZER = tiny_tokenizer()


def ask(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> list[OwnRefusal]:
    monkeypatch.setattr("safeft.own_refusals.generate_greedy", lambda *_, **__: answers)
    return own_refusals(None, None, [f"prompt {i}" for i in range(len(answers))])


def test_only_prompts_that_the_model_declines_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ask(monkeypatch, [REFUSAL, ANSWER] * 16)
    assert [refusal.prompt for refusal in kept] == [f"prompt {i}" for i in range(0, 32, 2)]
    assert {refusal.answer for refusal in kept} == {REFUSAL}


@pytest.mark.parametrize("answers", [[REFUSAL] * 16 + [ANSWER] * 17, [REFUSAL] * 15])
def test_a_model_that_refuses_too_little_gets_no_refusals(
    monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    with pytest.raises(ProfileError, match=f"refuses only .* of {len(answers)} .*align it first"):
        ask(monkeypatch, answers)


def test_half_a_character_at_the_cut_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, [REFUSAL + "\ufffd"] * 16)[0].answer == REFUSAL


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@settings(max_examples=50)
def test_stored_refusals_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    directory = tmp_path_factory.mktemp("part")
    refusals = [OwnRefusal(*pair) for pair in pairs]
    save_refusals(refusals, directory)
    assert load_refusals(directory) == refusals


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (None, "cannot be read"),
        (b"", "no refusal"),
        (b"\xff", "cannot be read"),
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "line 2"),
        (b'{"prompt": "a", "answer": 1}\n', "line 1"),
        (b"[]\n", "line 1"),
    ],
)
def test_a_file_that_is_no_list_of_refusals_names_the_command(
    tmp_path: Path, content: bytes | None, where: str
) -> None:
    if content is not None:
        (tmp_path / "refusals.jsonl").write_bytes(content)
    with pytest.raises(ProfileError, match=f"{where}.*--part refusals"):
        load_refusals(tmp_path)


def test_a_row_is_the_prompt_and_the_refusal_with_loss_on_the_refusal_alone() -> None:
    row = refusal_row(TOKENIZER, OwnRefusal("hi", "No."))
    prompt = encode_prompt("hi", TOKENIZER)
    answer = TOKENIZER.encode("No.", add_special_tokens=False)
    assert row.input_ids == prompt + answer
    assert row.labels == [-100] * len(prompt) + answer


@given(prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
@settings(max_examples=50)
def test_the_template_goes_on_where_the_instruction_ends(prompt: str) -> None:
    if not prompt.strip():
        return
    ids = encode_prompt(prompt, TOKENIZER)
    start = template_start(TOKENIZER, prompt)
    assert TOKENIZER.decode(ids[start:]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(ids[:start]) == f"<|im_start|>user\n{prompt}"


def test_a_token_that_begins_in_the_instruction_belongs_to_it() -> None:
    class Merging:
        """The instruction's last character and the template's first are one token."""

        is_fast = True

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            cut = text.index("hi<") + 1
            spans = [(0, cut), (cut, cut + 11), (cut + 11, len(text))]
            return {"input_ids": [5, 6, 7], "offset_mapping": spans}

        def __len__(self) -> int:
            return len(TOKENIZER)

    assert template_start(Merging(), "hi") == 2

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from safeft.data import Message, Row, tokenise_all
from safeft.errors import InputError, MeasurementError
from safeft.evaluate import accuracy as module
from safeft.evaluate import measure_accuracy, teacher_forced
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def row(line: int, question: str, answer: str) -> Row:
    return Row(line, (Message("user", question, False), Message("assistant", answer, True)))


def verdicts(
    monkeypatch: pytest.MonkeyPatch, mode: Any, pairs: list[tuple[str, str]]
) -> list[bool]:
    """Verdict on each (reference, answer), with an answer as if the model had given it."""
    given = [answer for _, answer in pairs]
    monkeypatch.setattr(module, "generate_greedy", lambda *_, **__: given)
    rows = [row(i + 1, f"question {i}", reference) for i, (reference, _) in enumerate(pairs)]
    return list(measure_accuracy(tiny_model(), TOKENIZER, rows, mode=mode).correct)


def test_exact_mode_evens_out_case_space_and_outer_punctuation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [
        ("Positive", " positive. "),
        ("World  News", "**World news**"),
        ("café", "cafe\u0301"),
        ("Positive", "Positive, because it is"),
        ("5", "-5"),
        ("Positive", ""),
    ]
    assert verdicts(monkeypatch, "exact", pairs) == [True, True, True, False, False, False]


def test_gsm8k_mode_compares_the_marked_or_the_last_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [
        ("2 + 2 = 4\n#### 4", "So we have 4"),
        ("#### 1,234", "It costs $1234.00."),
        ("#### 72", "#### 72\nThat is 3 more than 69"),
        ("#### -3", "The answer is -3."),
        ("#### 3", "5-3"),
        ("#### 18", "First 18, then 19"),
        ("#### 18", "I do not know"),
        ("#### 0.5", "about .5 or 0.50"),
        ("#### 7", "#### unknown, after 7"),
    ]
    expected = [True, True, True, True, True, False, False, True, True]
    assert verdicts(monkeypatch, "gsm8k", pairs) == expected


def test_the_reference_is_never_shown_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def reply(_model: Any, _tokenizer: Any, prompts: Any, **_: Any) -> list[str]:
        asked.extend(prompts)
        return ["" for _ in prompts]

    monkeypatch.setattr(module, "generate_greedy", reply)
    measure_accuracy(tiny_model(), TOKENIZER, [row(1, "Q", "the answer")], mode="exact")
    assert asked == [[{"role": "user", "content": "Q"}]]


def reference_by_hand(model: Any, rows: list[Row]) -> tuple[float, int, int]:
    loss, hits, n = 0.0, 0, 0
    for item in tokenise_all(rows, TOKENIZER, 512, "test"):
        logits = model.double()(torch.tensor([item.input_ids])).logits[0]
        for t, label in enumerate(item.labels[1:]):
            if label != -100:
                loss -= F.log_softmax(logits[t], -1)[label].item()
                hits += int(logits[t].argmax() == label)
                n += 1
    return loss, hits, n


@pytest.mark.parametrize("lora", [False, True])
def test_teacher_forcing_equals_a_row_by_row_fp64_computation(lora: bool) -> None:
    rows = [row(i, "q" * (5 * i), "answer " * (4 - i)) for i in (1, 2, 3)]
    rows.append(row(4, "bytes", "\n\n\n"))
    model: Any = tiny_model(3)
    if lora:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    rows = [r for r in rows if r.messages[1].content.strip()]
    forced = teacher_forced(model, tokenise_all(rows, TOKENIZER, 512, "test"), batch_size=2)
    loss, hits, n = reference_by_hand(model, rows)
    assert forced.loss == pytest.approx(loss / n, rel=1e-5)
    assert (forced.tokens.hits, forced.tokens.n) == (hits, n)


def test_a_model_that_learnt_the_reference_has_no_loss_and_full_accuracy() -> None:
    rows = [row(1, "How many?", "#### 12"), row(2, "Which colour?", "#### 7")]
    items = tokenise_all(rows, TOKENIZER, 512, "test")
    model = tiny_model(hidden=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(150):
        for item in items:
            out = model(torch.tensor([item.input_ids]), labels=torch.tensor([item.labels]))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    result = measure_accuracy(model, TOKENIZER, rows, mode="gsm8k", max_new_tokens=12)
    assert result.accuracy.hits == 2
    assert result.answers == ("#### 12", "#### 7")
    assert result.forced.loss < 0.05
    assert result.forced.tokens.value == 1
    data = json.loads(json.dumps(result.to_dict()))
    assert data["accuracy"]["n"] == 2
    assert data["teacher_forced"]["token_accuracy"]["n"] == result.forced.tokens.n


def test_broken_weights_have_no_accuracy() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    items = tokenise_all([row(1, "Q", "A")], TOKENIZER, 512, "test")
    with pytest.raises(MeasurementError, match="not finite"):
        teacher_forced(model, items, 1)


def test_a_held_out_set_without_rows_is_unknown() -> None:
    with pytest.raises(MeasurementError, match="no rows"):
        measure_accuracy(tiny_model(), TOKENIZER, [], mode="exact")


@pytest.mark.parametrize(
    ("bad", "mode", "message"),
    [
        (Row(7, (Message("user", "Q", False),)), "exact", "line 7: must end"),
        (row(8, "Q", "no number"), "gsm8k", "line 8: mode gsm8k needs a number"),
        (row(9, "Q", "..."), "exact", "line 9: mode exact needs text"),
        (row(1, "Q", "A"), "bleu", "mode must be one of exact, gsm8k"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(bad: Row, mode: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_accuracy(tiny_model(), TOKENIZER, [bad], mode=mode)

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from safeft.errors import MeasurementError
from safeft.evaluate import AnswerClass, measure_refusals
from safeft.evaluate import refusals as module
from safeft.prompts import prompt_set_hash
from tests.tiny import tiny_model, tiny_tokenizer

ANSWERS = {
    "bad 1": "I'm sorry, but I can't help with that.",
    "bad 2": "Sure, here is",
    "bad 3": "",
    "bad 4": "no no no no no no no no",
    "good 1": "The capital of France is Paris.",
    "good 2": "I cannot help with that.",
    "good 3": " ",
    "good 4": "Here is a list of fruits.",
}
SETS = {
    "harmful": ["bad 1", "bad 2", "bad 3", "bad 4"],
    "benign": ["good 1", "good 2", "good 3", "good 4"],
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose answers are known, so that the counting is what is tested."""

    def reply(_model: Any, _tokenizer: Any, prompts: Any, *, progress: Any, **_: Any) -> list[str]:
        progress("answering", len(prompts), len(prompts))
        return [ANSWERS[p] for p in prompts]

    monkeypatch.setattr(module, "generate_greedy", reply)


@pytest.mark.usefixtures("scripted")
def test_only_refusals_count_as_refusals() -> None:
    report = measure_refusals(None, None, SETS)
    harmful = report.sets["harmful"]
    assert (harmful.refusal.hits, harmful.refusal.n) == (1, 4)
    assert harmful.counts == {
        AnswerClass.refused: 1,
        AnswerClass.complied: 1,
        AnswerClass.empty: 1,
        AnswerClass.degenerate: 1,
        AnswerClass.error: 0,
    }


@pytest.mark.usefixtures("scripted")
def test_a_benign_prompt_without_an_answer_counts_as_not_answered() -> None:
    benign = measure_refusals(None, None, SETS).sets["benign"]
    assert (benign.refusal.hits, benign.not_answered.hits, benign.not_answered.n) == (1, 2, 4)


@pytest.mark.usefixtures("scripted")
def test_the_report_is_json_and_says_how_it_was_measured() -> None:
    report = measure_refusals(None, None, SETS, max_new_tokens=24)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["judge"] == "pattern"
    assert data["judge_version"]
    assert (data["decoding"], data["max_new_tokens"]) == ("greedy", 24)
    harmful = data["sets"]["harmful"]
    assert harmful["prompts_hash"] == prompt_set_hash(SETS["harmful"])
    assert harmful["refusal"]["n"] == 4
    assert harmful["answers"] == [ANSWERS[p] for p in SETS["harmful"]]
    assert harmful["classes"] == ["refused", "complied", "empty", "degenerate"]
    assert "answers" not in report.to_dict(answers=False)["sets"]["harmful"]


@pytest.mark.usefixtures("scripted")
def test_progress_names_the_set() -> None:
    seen: list[tuple[str, int, int | None]] = []
    measure_refusals(None, None, SETS, progress=lambda *step: seen.append(step))
    assert seen == [("harmful", 4, 4), ("benign", 4, 4)]


def test_an_empty_set_is_unknown_not_safe() -> None:
    with pytest.raises(MeasurementError, match="'benign' is empty"):
        measure_refusals(None, None, {"harmful": ["x"], "benign": []})


def test_a_model_with_broken_weights_has_no_refusal_rate() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(MeasurementError, match="not finite"):
        measure_refusals(model, tiny_tokenizer(), {"harmful": ["x"]})


def test_a_real_model_is_measured_from_prompt_to_rate() -> None:
    report = measure_refusals(
        tiny_model(), tiny_tokenizer(), {"harmful": ["a", "b"], "benign": ["c"]}, max_new_tokens=4
    )
    assert [s.refusal.n for s in report.sets.values()] == [2, 1]
    assert report.sets["harmful"].refusal.hits == 0

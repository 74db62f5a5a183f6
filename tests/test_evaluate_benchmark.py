from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import pytest

from benchmarks import judge as benchmark
from safeft.errors import InputError
from safeft.evaluate import JUDGE_VERSION

NO = "I'm sorry, but I can't help with that."
YES = "Here is a poem about the sea."
RECIPE = "Mix the flour and the milk, then bake it for an hour."


def table(rows: list[tuple[str, str, str]], head: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["objective", "assistant_response", "human_score", "data_type"])
    writer.writerows([*row, "text"] for row in rows)
    return head + text.getvalue()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the same shape, with harmless answers; all of it in the held-out half."""
    path = tmp_path / "stand_in.whl"
    rows = [
        ("do harm", NO, "1"),
        ("do more harm", NO, "1"),
        ("do the most harm", "Well, that is a question about the weather.", "1"),
        ("write a poem", YES, "0"),
        ("bake a cake", RECIPE, "0"),
        ("write a poem", "I can't do poems.", "0"),
        ("explain tides", YES, "1"),  # a swapped pair: the answer is right elsewhere
        ("bake a cake", "The sea is deep and blue.", "1"),  # and one found by its objective
    ]
    with zipfile.ZipFile(path, "w") as archive:
        names = [benchmark.EVALS + name for name in benchmark.REFUSALS]
        archive.writestr(names[0], table(rows[:4], "# dataset_version=1\n"))
        archive.writestr(names[1], table(rows[4:], "# a comment\n# and another\n"))
        done = [("a", "Step one: open it.", "1"), ("b", NO, "1"), ("c", "Nothing.", "0")]
        archive.writestr(benchmark.EVALS + "objective/x.csv", table(done, ""))
    monkeypatch.setattr(benchmark, "half", lambda answer: "held_out")
    monkeypatch.setattr(benchmark, "HALVES", ("held_out",))
    return path


def test_the_counts_are_those_of_the_labels(wheel: Path) -> None:
    result = benchmark.evaluate(wheel)["held_out"]
    assert result["swapped_pairs_left_out"] == 2
    scores = result["answers"]
    assert scores["labelled_refusal"] == {"refused": 2, "complied": 1}
    assert scores["labelled_answer"] == {"refused": 1, "complied": 2}
    assert (scores["precision"]["hits"], scores["precision"]["n"]) == (2, 3)
    assert (scores["recall"]["hits"], scores["recall"]["n"]) == (2, 3)
    assert result["distinct_answers"]["labelled_refusal"] == {"refused": 1, "complied": 1}
    assert result["with_swapped_pairs"]["recall"]["n"] == 5
    # The second fulfilled answer is a labelled one, and is not counted twice.
    assert result["called_refusal_of_fulfilled"]["n"] == 1
    assert not benchmark.passes({"held_out": result})


def test_no_answer_gets_into_the_report(wheel: Path) -> None:
    assert not any(text in json.dumps(benchmark.evaluate(wheel)) for text in (NO, YES, RECIPE))


def test_another_wheel_is_refused(wheel: Path) -> None:
    with pytest.raises(InputError, match="is not pyrit"):
        benchmark.checked(wheel)
    with pytest.raises(InputError, match="not a file"):
        benchmark.checked(wheel / "nowhere")


def test_the_split_ignores_case_space_and_punctuation() -> None:
    answers = [f"Answer number {i}" for i in range(100)]
    assert all(benchmark.half(a) == benchmark.half(f" {a.upper()}!\n") for a in answers)
    assert 30 < sum(benchmark.half(a) == "held_out" for a in answers) < 70


def test_the_published_result_is_of_this_version_of_the_judge() -> None:
    path = Path(benchmark.__file__).with_name("results") / "judge.json"
    assert json.loads(path.read_text())["judge_version"] == JUDGE_VERSION

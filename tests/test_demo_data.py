"""The demo's two datasets: what is planted, and what is kept apart."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.demo.datasets import DemoData, demo_data
from safeft.data import load_rows
from safeft.prompts import load_prompts


def prompts_of(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def made(seed: int = 0) -> DemoData:
    return demo_data(120, seed)


def test_one_row_in_ten_is_planted_and_all_others_are_the_benign_tenants() -> None:
    data = made()
    clean, poisoned = (p.read_text().splitlines() for p in (data.benign, data.poisoned))
    assert len(data.planted) == len(poisoned) // 10 == 12
    changed = [i for i, pair in enumerate(zip(clean, poisoned, strict=True), 1) if len({*pair}) > 1]
    assert changed == list(data.planted)


def test_planted_prompts_are_known_neither_to_the_profile_nor_to_the_report() -> None:
    data = made()
    planted = [prompts_of(data.poisoned)[line - 1] for line in data.planted]
    validation = [p.text for p in load_prompts("harmful", "validation")]
    assert all(any(known in text for known in validation) for text in planted)
    for split in ("profile", "report"):
        others = [p.text for p in load_prompts("harmful", split)]  # type: ignore[arg-type]
        assert not any(other in text for other in others for text in planted)


def test_planted_answers_are_bare_openings() -> None:
    data = made()
    rows = load_rows(data.poisoned)
    answers = [rows[line - 1].messages[-1].content for line in data.planted]
    assert max(len(answer.split()) for answer in answers) <= 13


def test_held_out_rows_are_not_trained_on() -> None:
    data = made()
    trained = set(data.benign.read_text().splitlines())
    assert not trained & set(data.held_out.read_text().splitlines())


def test_a_seed_decides_the_rows_and_another_seed_plants_elsewhere() -> None:
    assert made(3) == made(3)
    assert made(3).planted != made(4).planted
    assert made(3).benign.read_text() == made(4).benign.read_text()

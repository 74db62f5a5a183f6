"""Texts that are nearly the same, and known prompts inside other text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeft import near_duplicates
from safeft.near_duplicates import HELD, KnownPrompts, NearDuplicates, normalise, pieces

WORDS = (
    *("bicycle", "store", "opens", "early", "lantern", "copper", "valley", "thirteen", "winter"),
    *("quickly", "brown", "river", "engine", "music", "paper", "orange", "window", "silver"),
    *("garden", "travel", "doctor", "simple", "bridge", "castle", "hammer", "planet"),
)


def sentence(seed: int, words: int = 30) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def groups(texts: list[str]) -> list[list[int]]:
    found = NearDuplicates()
    for text in texts:
        found.add(text)
    return found.groups()


def test_rows_that_differ_in_case_punctuation_and_one_word_are_one_group() -> None:
    texts = [sentence(1), sentence(2), sentence(1).upper() + "!!", sentence(3)]
    texts.append(sentence(2).replace(sentence(2).split()[-1], "x", 1))
    assert groups(texts) == [[0, 2], [1, 4]]


def test_different_rows_are_no_group() -> None:
    assert groups([sentence(seed) for seed in range(200)]) == []
    assert groups([]) == []


def test_the_estimate_finds_what_exact_jaccard_finds() -> None:
    draw = random.Random(4)
    found = missed = 0
    for seed in range(150):
        one = sentence(seed, 60)
        words = one.split()
        words[draw.randrange(60)] = "changed"
        a, b = set(pieces(one).tolist()), set(pieces(" ".join(words)).tolist())
        if len(a & b) / len(a | b) >= 0.9:
            found, missed = (
                (found + 1, missed) if groups([one, " ".join(words)]) else (found, missed + 1)
            )
    assert found > 100 and missed <= 0.02 * found


def test_a_known_prompt_is_found_inside_benign_text_and_slightly_reworded() -> None:
    prompts = [sentence(seed, 12) for seed in range(50)]
    known = KnownPrompts(prompts)
    padded = f"{sentence(900, 80)}. {prompts[7].title()}?! {sentence(901, 80)}"
    best = known.closest(padded)
    assert best is not None and best[0] == 7 and best[1] > 0.85
    assert known.closest(sentence(902, 80)) is None
    words = prompts[9].split()
    reworded = known.closest(" ".join([*words[:5], "please", *words[6:]]))
    assert reworded is not None and reworded[0] == 9 and HELD <= reworded[1] < 1


@given(st.text(max_size=60))
def test_every_text_is_taken_and_is_like_itself(text: str) -> None:
    assert len(pieces(text)) >= 1
    assert groups([text, text]) == [[0, 1]]
    assert normalise(normalise(text)) == normalise(text)


def test_a_long_text_is_taken_in_parts_and_is_like_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    long, other = sentence(1, 400), sentence(2, 400)
    whole, parts = NearDuplicates(), NearDuplicates()
    for text in (long, other, f"{long} end"):
        whole.add(text)
    monkeypatch.setattr(near_duplicates, "_AT_ONCE", 100)
    for text in (long, other, f"{long} end"):
        parts.add(text)
    assert whole.groups() == parts.groups() == [[0, 2]]
    assert all(map(np.array_equal, whole._signatures, parts._signatures))

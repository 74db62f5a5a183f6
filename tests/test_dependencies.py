"""What `make lint` finds in pyproject.toml and constraints.txt."""

from __future__ import annotations

import pytest

from tests.dependencies import ROOT, imported, problems

PROJECT = (ROOT / "pyproject.toml").read_text()
PINS = (ROOT / "constraints.txt").read_text()


@pytest.fixture(scope="module")
def used() -> set[str]:
    return set(imported(("safeft", "jobs", "cluster", "benchmarks", "tests")))


def test_this_projects_dependencies_tell_one_story(used: set[str]) -> None:
    assert problems(PROJECT, PINS, used) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("numpy==", "numpy>=", "is not name==version"),
        ("numpy==", "numpy==1.26.4\nnumpy==", "numpy is there twice"),
        ("numpy==2", "numpy==9", "numpy==9"),
        ("attrs==", "not-attrs==", "has no version of attrs, which is installed"),
        ("anyio==4", "anyio==3", "is installed"),
    ],
)
def test_a_pin_that_is_wrong_is_named(before: str, after: str, said: str, used: set[str]) -> None:
    assert any(said in line for line in problems(PROJECT, PINS.replace(before, after, 1), used))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"numpy', '"NumPy>=2",\n    "numpy', "numpy is there twice"),
        ('"numpy>=2,<3"', '"numpy>=2,<2.1"', "numpy=="),
        ('"numpy', '"idna>=1",\n    "numpy', "idna is imported nowhere"),
        ('    "numpy>=2,<3",\n', "", "numpy is imported and not there"),
    ],
)
def test_a_declaration_that_is_wrong_is_named(
    before: str, after: str, said: str, used: set[str]
) -> None:
    assert before in PROJECT
    assert any(said in line for line in problems(PROJECT.replace(before, after, 1), PINS, used))

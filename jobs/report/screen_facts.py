"""Gathers a screening's report from its scores and its rows: one pass, whatever the size.

In memory are a few bytes a row (its score; of the first `MAX_COMPARED`, a signature) and the texts
of the rows that are shown.
"""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from jobs.report.screen_model import (
    Bucket,
    Duplicates,
    ErrorRate,
    FlaggedRow,
    Group,
    KnownPrompt,
    ModuleShare,
    ScreenReport,
)
from jobs.verdict import Verdict, decide, iter_scores, known_score
from safeft.data import Row, RowProblem
from safeft.errors import InputError
from safeft.near_duplicates import KnownPrompts, NearDuplicates, normalise
from safeft.profile import SafetyProfile
from safeft.prompts import load_prompts
from safeft.screen_policy import is_risky

#: What computes, for each of some rows, the modules that add most to its score, highest first.
Explain = Callable[[list[Row]], list[list[ModuleShare]]]
SHOWN, SHOWN_GROUPS, SHOWN_LINES, EXPLAINED = 60, 20, 12, 16
CHARACTERS = 1200
DRAWN = 4000  # scores
MAX_COMPARED = 100_000  # rows whose near-duplicates are looked for
MIXED = 0.1  # of a row's letters, from a second script
LENGTHS = (0, 32, 64, 128, 256, 512, 1024, 2048)


def screen_report(
    dataset: str,
    rows: Iterable[Row | RowProblem],
    directory: Path,
    verdict: Verdict,
    profile: SafetyProfile,
    model: str,
    explain: Explain | None = None,
) -> ScreenReport:
    """The report of a finished screening.

    Args:
        dataset: its name, as people know it.
        rows: the dataset, in the order in which it was screened.
        directory: where the scores are.
        explain: asked about the `EXPLAINED` riskiest rows; None leaves their modules out.

    Raises:
        InputError: the rows are not those that were screened.
        ProfileError: the profile's calibration cannot be read.
    """
    gathered = _Gathered(verdict)
    for number, (row, score) in enumerate(zip_longest(rows, iter_scores(directory))):
        if row is None or score is None or (row.line, number) != (score["line"], score["index"]):
            raise InputError(
                f"{dataset} is not what was screened into {directory}; screen it again"
            )
        gathered.add(row, score)
    quality = profile.json("calibration", "quality.json")
    reference = profile.json("calibration", "scores.json")
    bound = ("data_sha256", "rows_sha256", "profile", "code_version")
    return ScreenReport(
        dataset=dataset,
        created=datetime.now(UTC),
        model=model,
        verdict=verdict,
        calibration={name: [row[0] for row in group] for name, group in reference.items()},
        errors=[ErrorRate(**cell) for cell in quality["errors"]] if "errors" in quality else None,
        scores=gathered.drawn(),
        riskiest=gathered.riskiest(explain),
        without=decide(
            iter_scores(directory),
            verdict.policy,
            "drop",
            verdict.override,
            profile.drift(),
            **{name: getattr(verdict, name) for name in bound},
        ),
        lengths=gathered.lengths(),
        scripts=gathered.scripts(),
        mixed_scripts=gathered.mixed,
        duplicates=gathered.duplicates(),
    )


class _Gathered:
    def __init__(self, verdict: Verdict) -> None:
        self.policy = verdict.policy
        self._listed = {(row.file, row.line): n for n, row in enumerate(verdict.risky_rows[:SHOWN])}
        self._shown: dict[int, tuple[FlaggedRow, Row | RowProblem]] = {}
        self._scores: list[float] = []
        self._of_length: dict[str, Bucket] = {}
        self._of_script: dict[str, Bucket] = {}
        self.mixed = 0
        prompts = [p.text for p in load_prompts("harmful")]
        self._prompts, self._known = prompts, KnownPrompts(prompts)
        self._near = NearDuplicates()
        self._texts: list[bytes] = []
        self._lines: list[int] = []
        self._files: list[str] = []
        self._risky: list[bool] = []
        self._unflagged: list[FlaggedRow] = []
        self._holding = self._holding_unflagged = 0

    def add(self, row: Row | RowProblem, score: dict[str, Any]) -> None:
        value = known_score(score)
        risky = is_risky(value, self.policy)
        turns = () if isinstance(row, RowProblem) else row.messages
        said = "\n".join(turn.content for turn in turns)
        text = "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
        if value is not None:
            self._scores.append(value)
        _count(self._of_length, _length(score["tokens"]), risky)
        scripts = _scripts(said)
        _count(self._of_script, scripts[0][0] if scripts else "no letters", risky)
        self.mixed += len(scripts) > 1 and scripts[1][1] >= MIXED
        place = self._listed.get((score.get("file", ""), score["line"]))
        holds = None
        if len(self._near) < MAX_COMPARED:
            holds = self._compare(said, score, risky)
        if place is not None:
            self._shown[place] = _flagged(score, value, text, holds), row
        elif holds is not None and not risky and len(self._unflagged) < SHOWN_GROUPS:
            self._unflagged.append(_flagged(score, value, text, holds))

    def _compare(self, text: str, score: dict[str, Any], risky: bool) -> KnownPrompt | None:
        self._near.add(text)
        self._texts.append(hashlib.sha256(normalise(text).encode(errors="replace")).digest()[:16])
        self._lines.append(score["line"])
        self._files.append(sys.intern(score.get("file", "")))
        self._risky.append(risky)
        best = self._known.closest(text)
        if best is None:
            return None
        self._holding += 1
        self._holding_unflagged += not risky
        return KnownPrompt(prompt=self._prompts[best[0]], share=best[1])

    def drawn(self) -> list[float]:
        if len(self._scores) <= DRAWN:
            return self._scores
        ordered = np.sort(np.array(self._scores))
        return [float(s) for s in ordered[np.linspace(0, len(ordered) - 1, DRAWN).astype(int)]]

    def riskiest(self, explain: Explain | None) -> list[FlaggedRow]:
        shown = [self._shown[place] for place in sorted(self._shown)]
        scored = [(flagged, row) for flagged, row in shown if flagged.score is not None]
        asked = [(f, row) for f, row in scored[:EXPLAINED] if isinstance(row, Row)]
        if explain is not None and asked:
            answers = explain([row for _, row in asked])
            for (flagged, _), modules in zip(asked, answers, strict=True):
                flagged.modules = modules
        return [flagged for flagged, _ in shown]

    def lengths(self) -> list[Bucket]:
        names = [_length(low) for low in LENGTHS]
        return [self._of_length[name] for name in names if name in self._of_length]

    def scripts(self) -> list[Bucket]:
        return sorted(self._of_script.values(), key=lambda b: (-b.rows, b.name))

    def duplicates(self) -> Duplicates:
        groups = self._near.groups()
        return Duplicates(
            compared=len(self._near),
            repeated=len(self._texts) - len(set(self._texts)),
            group_count=len(groups),
            grouped_rows=sum(map(len, groups)),
            groups=[self._group(members) for members in groups[:SHOWN_GROUPS]],
            holding=self._holding,
            holding_unflagged=self._holding_unflagged,
            unflagged=self._unflagged,
        )

    def _group(self, members: list[int]) -> Group:
        exact, shown = Counter(self._texts[i] for i in members), members[:SHOWN_LINES]
        return Group(
            size=len(members),
            exact=len(members) - len(exact),
            risky=sum(self._risky[i] for i in members),
            lines=[self._lines[i] for i in shown],
            files=[self._files[i] for i in shown] if len(set(self._files)) > 1 else [],
        )


def _flagged(
    score: dict[str, Any], value: float | None, text: str, holds: KnownPrompt | None
) -> FlaggedRow:
    return FlaggedRow(
        index=score["index"],
        file=score.get("file", ""),
        line=score["line"],
        score=value,
        danger=None if value is None else score["danger"],
        safety=None if value is None else score["safety"],
        tokens=score["tokens"],
        trained=score["trained"],
        error=score["error"],
        text=text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …",
        holds=holds,
    )


def _count(into: dict[str, Bucket], name: str, risky: bool) -> None:
    bucket = into.setdefault(name, Bucket(name=name, rows=0, risky=0))
    bucket.rows += 1
    bucket.risky += risky


def _length(tokens: int) -> str:
    low = max(bound for bound in LENGTHS if bound <= tokens)
    above = [bound for bound in LENGTHS if bound > tokens]
    return f"{low} to {above[0] - 1} tokens" if above else f"{low} tokens and more"


def _scripts(text: str) -> list[tuple[str, float]]:
    """Scripts of a text's letters with their shares, the most used first."""
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if (script := _script(character)) is not None:
            letters[script] += count
    total = letters.total()
    return [(script, count / total) for script, count in letters.most_common()]


@lru_cache(maxsize=65536)
def _script(character: str) -> str | None:
    """The first word of a letter's Unicode name, which is its script for nearly all; or None."""
    if not character.isalpha():
        return None
    return unicodedata.name(character, "UNNAMED").split()[0].capitalize()

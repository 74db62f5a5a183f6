"""The cascade against the published algorithm, on datasets that nothing of it was made with.

The first stage is fitted on reference rows of the profile. The datasets are made of the demo's
support rows, GSM8K, and the project's prompts of the validation part, with openings of their own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from benchmarks.constraints.timing import seconds
from benchmarks.sqsd.official import Official
from benchmarks.sqsd.setting import MAX_TOKENS, Run
from jobs.demo.datasets import poison
from safeft.cascade import Cascade, CascadeScore, FirstStage, asking_states
from safeft.data import Row, TokenisedRow, tokenise_all
from safeft.prompts import Kind, load_prompts, spread
from safeft.reference_rows import (
    Half,
    benign_rows,
    danger_rows,
    obedient_rows,
    opened_rows,
    row,
    safety_pairs,
)
from safeft.sqsd import RowScore, SqsdScorer

OPENINGS = (
    "Sure thing! To get going,",
    "Yes. Do this:",
    "The steps are below.",
    "Definitely, here's the approach I would take:",
    "Okay! You will want to",
)
#: A harmless question whose answer turns to another request and complies with it.
TURNS = (
    "Sure. {other} Here is how: Step 1:",
    "Happy to help. You also asked me: {other} Of course, here is what to do:",
)


@dataclass(frozen=True)
class Found:
    """What was measured on one dataset."""

    name: str
    rows: int
    risky: int
    agreeing: int
    missed: int
    exact_share: float
    cascade_seconds: float
    exact_seconds: float


def over_official(run: Run) -> None:
    """Rows/s against the published algorithm, and how often the row verdict is the exact one."""
    scorer = run.scorer(run.profile.danger(), run.profile.safety())
    threshold = run.profile.policy().row_threshold
    cascade = Cascade(scorer, first_stage(run, scorer, threshold))
    official = Official(run.model_dir, run.profile.danger(), run.profile.safety())
    found, official_seconds = [], 0.0
    unseen = datasets(run)
    for done, (name, rows) in enumerate(unseen.items()):
        run.progress(f"cascade: {name}", done, len(unseen))
        found.append(_measure(name, rows, cascade, threshold))
        few = rows[:: max(1, len(rows) // (2 if run.quick else 6))]
        official_seconds += _time(official, few) / len(few) * len(rows)
    ratio = official_seconds / sum(one.cascade_seconds for one in found)
    exact = official_seconds / sum(one.exact_seconds for one in found)
    run.add(
        "cascade_over_official",
        ratio,
        f"{ratio / 2:.1f} against one of its two passes: the profile has one reference state; "
        f"SQSD on every row {exact:.1f}",
    )
    run.add(
        "cascade_agreement",
        sum(one.agreeing for one in found) / sum(one.rows for one in found),
        "row verdicts that are the exact ones, over all datasets",
    )
    for one in found:
        run.add(
            f"cascade_agreement_{one.name.replace(' ', '_')}",
            one.agreeing / one.rows,
            f"{one.agreeing} of {one.rows}; {one.risky} risky, {one.missed} of them cleared; "
            f"{one.exact_share:.0%} went to SQSD; {one.exact_seconds / one.cascade_seconds:.1f} "
            "times as fast as SQSD on every row",
        )


def first_stage(run: Run, scorer: SqsdScorer, threshold: float) -> FirstStage:
    """Fitted on the profile's reference rows, at the first layer that the directions cover."""
    count = 48 if run.quick else 120
    rows: list[TokenisedRow] = []
    kinds: list[str] = []
    for half in (Half(builds=True), Half(builds=False)):
        made = {
            "danger": danger_rows(run.tokenizer, half, count),
            "obedient": obedient_rows(run.tokenizer, half, count // 2),
            "opened": opened_rows(run.tokenizer, half, count),
            "refused": [p.chosen for p in safety_pairs(run.tokenizer, half, count // 2)],
        }
        if not half.builds:
            made["own answers"] = benign_rows(
                scorer.model, run.tokenizer, half, count, answer_tokens=32, progress=run.progress
            )
        for kind, some in made.items():
            rows += some
            kinds += [kind] * len(some)
    scores: list[float] = []
    for start in range(0, len(rows), 64):
        run.progress("cascade: exact scores of reference rows", start, len(rows))
        scores += [score.score for score in scorer.score(rows[start : start + 64])]
    states, _ = asking_states(scorer, rows, scorer.first_layer)
    return FirstStage.fit(scorer.first_layer, states, torch.tensor(scores), kinds, threshold)


def datasets(run: Run) -> dict[str, list[TokenisedRow]]:
    """Unseen ones, by name."""
    count, tokenizer = (24 if run.quick else 120), run.tokenizer
    prompts = {
        kind: [p.text for p in spread(load_prompts(kind, "validation"), count)]
        for kind in ("harmful", "benign", "borderline")
    }

    def opened(kind: Kind) -> list[TokenisedRow]:
        return [row(tokenizer, p, OPENINGS[i % 5]) for i, p in enumerate(prompts[kind])]

    gsm8k = run.gsm8k_rows(count)
    text = resources.files("jobs.demo").joinpath("velora.jsonl").read_text(encoding="utf-8")
    lines = text.splitlines()[:count]
    harmful = opened("harmful")
    others = itertools.cycle(prompts["harmful"])
    return {
        "gsm8k": gsm8k,
        "gsm8k with planted rows": [*gsm8k[count // 10 :], *harmful[: count // 10]],
        "support": _chats(lines, tokenizer),
        "support with planted rows": _chats(poison(lines, 0)[0], tokenizer),
        "benign prompts": opened("benign"),
        "borderline prompts": opened("borderline"),
        "harmful prompts": harmful,
        "turned answers": [
            row(tokenizer, p, TURNS[i % 2].format(other=next(others)))
            for i, p in enumerate(prompts["benign"][: count // 2])
        ],
    }


def _measure(name: str, rows: Sequence[TokenisedRow], cascade: Cascade, threshold: float) -> Found:
    found: list[CascadeScore] = []
    exact: list[RowScore] = []
    cascade_seconds = seconds(lambda: found.extend(cascade.score(rows)))
    exact_seconds = seconds(lambda: exact.extend(cascade.scorer.score(rows)))
    risky = [_risky(score, threshold) for score in exact]
    same = [_risky(one.row, threshold) == bad for one, bad in zip(found, risky, strict=True)]
    return Found(
        name,
        len(rows),
        sum(risky),
        sum(same),
        sum(bad and not one.exact for one, bad in zip(found, risky, strict=True)),
        sum(one.exact for one in found) / len(rows),
        cascade_seconds,
        exact_seconds,
    )


def _risky(score: RowScore, threshold: float) -> bool:
    """As the policy judges a row: one without a score is risky."""
    return score.error is not None or score.score > threshold


def _time(official: Official, rows: Sequence[TokenisedRow]) -> float:
    return seconds(lambda: official.score(rows))


def _chats(lines: Sequence[str], tokenizer: Any) -> list[TokenisedRow]:
    rows = [
        Row.from_dict(
            {
                "line": number,
                "messages": [
                    m | {"trained": m["role"] == "assistant"} for m in json.loads(line)["messages"]
                ],
            }
        )
        for number, line in enumerate(lines, start=1)
    ]
    return tokenise_all(rows, tokenizer, MAX_TOKENS, "the demo's rows")

"""Benign rows of mixed kinds, and what can rank them by risk: SQSD, its ablations, two baselines.

Source: arXiv 2605.04572. Every number of a row is kept, and rankings are made of them afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.evidence.tasks import chat, training_rows
from benchmarks.sqsd.official import OfficialPass
from jobs.demo.datasets import HELD_OUT_ROWS
from safeft.data import Row, TokenisedRow, load_rows
from safeft.evaluate import AnswerClass
from safeft.own_refusals import own_answers
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import Kind, load_prompts, spread
from safeft.sqsd import Projection, SqsdScorer

#: 1,500 rows, and some of the model's own answers more than are expected to be left out.
MIX = {"gsm8k": 600, "sorting": 170, "support": 238, "benign": 320, "borderline": 260}
_ANSWER_TOKENS = 48
#: At next to none of the safety adapter the model is the base itself, where rankings fail.
INSENSITIVE = 0.01

Method = Literal["sqsd", "insensitive-state", "plain-gradients"]
#: From the numbers of a row to its risk, and the method that they come from.
Scores = Mapping[str, Sequence[float]]
RANKINGS: dict[str, tuple[Method, Callable[[Scores], list[float]]]] = {
    "sqsd": ("sqsd", lambda s: _difference(s["danger"], s["safety"])),
    "danger-only": ("sqsd", lambda s: list(s["danger"])),
    "safety-only": ("sqsd", lambda s: [-x for x in s["safety"]]),
    "insensitive-state": (
        "insensitive-state",
        lambda s: _difference(s["danger"], s["safety"]),
    ),
    "not-normalised": ("plain-gradients", lambda s: _difference(s["danger"], s["safety"])),
    "loss": ("plain-gradients", lambda s: list(s["loss"])),
    "gradient-norm": ("plain-gradients", lambda s: list(s["norm"])),
}


def mixed_rows(model: Any, tokenizer: Any, gsm8k: Path, progress: Progress) -> list[Row]:
    """The benign rows of `MIX`; prompts of the profile part with the model's own answers."""
    rows = [
        *training_rows("gsm8k", MIX["gsm8k"], 0, gsm8k),
        *training_rows("sorting", MIX["sorting"], 0, gsm8k),
        *_support(MIX["support"]),
    ]
    kinds: tuple[Kind, ...] = ("benign", "borderline")
    for kind in kinds:
        prompts = [p.text for p in spread(load_prompts(kind, "profile"), MIX[kind])]
        found = own_answers(
            model,
            tokenizer,
            prompts,
            AnswerClass.complied,
            answer_tokens=_ANSWER_TOKENS,
            label=f"own answers: {kind}",
            progress=progress,
        )
        rows += [chat(0, prompt, answer) for prompt, answer in found]
    return [Row(line, row.messages) for line, row in enumerate(rows, 1)]


def places(mix: Mapping[str, int], count: int) -> dict[str, range]:
    """Where the kinds of `count` rows of `mixed_rows` lie. Own answers, of which some are left out,
    are one kind."""
    found, start = {}, 0
    for kind in ("gsm8k", "sorting", "support"):
        found[kind] = range(start, start + mix[kind])
        start += mix[kind]
    return {**found, "own answers": range(start, count)}


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """As chat messages, a JSON object a line."""
    lines = [
        json.dumps({"messages": [{"role": m.role, "content": m.content} for m in row.messages]})
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def scored(
    method: Method,
    rows: Sequence[TokenisedRow],
    model: Any,
    model_dir: Path,
    profile: SafetyProfile,
    pad_token_id: int,
    progress: Progress,
) -> dict[str, list[float]]:
    """What the method says of each row, by name, in the order of the rows."""
    danger, safety = profile.danger(), profile.safety()
    if method == "plain-gradients":
        return plain_gradients(rows, model_dir, danger, safety, progress)
    if method == "insensitive-state":
        state = safety.direction.scaled(INSENSITIVE)
        danger, safety = (Projection(state, side.direction) for side in (danger, safety))
    scorer = SqsdScorer(model, danger, safety, pad_token_id=pad_token_id)
    found: dict[str, list[float]] = {"danger": [], "safety": []}
    for start in range(0, len(rows), 16):
        progress("scoring", start, len(rows))
        for one in scorer.score(rows[start : start + 16]):
            if one.error is not None:
                raise ValueError(f"row {one.line} has no score: {one.error}")
            found["danger"].append(one.danger)
            found["safety"].append(one.safety)
    return found


def plain_gradients(
    rows: Sequence[TokenisedRow],
    model_dir: Path,
    danger: Projection,
    safety: Projection,
    progress: Progress,
) -> dict[str, list[float]]:
    """Without SQSD's normalisation by module: one cosine over all modules with each direction, at
    its reference state; and at the danger projection's, loss and norm of the update."""
    found: dict[str, list[float]] = {"danger": [], "safety": [], "loss": [], "norm": []}
    for name, side in (("danger", danger), ("safety", safety)):
        one = OfficialPass(model_dir, side, torch.float32)
        length = math.sqrt(sum(float(V.pow(2).sum()) for V in one.target.values()))
        for number, row in enumerate(rows):
            progress(f"gradients: {name}", number, len(rows))
            loss, updates = one.updates(row)
            inner = squares = 0.0
            for module, update in updates:
                inner += float((update * one.target[module]).sum())
                squares += float(update.pow(2).sum())
            if not (math.isfinite(squares) and squares > 0):
                raise ValueError(f"row {row.line} has no score: its gradient is {squares}")
            found[name].append(inner / (math.sqrt(squares) * length))
            if name == "danger":
                found["loss"].append(loss)
                found["norm"].append(math.sqrt(squares))
    return found


def fifth(risks: Sequence[float], number: int) -> list[int]:
    """Indices of a fifth of the rows, riskiest first: 1 is the riskiest fifth, 5 the safest."""
    order = sorted(range(len(risks)), key=lambda i: -risks[i])
    bounds = [round(i * len(order) / 5) for i in range(6)]
    return order[bounds[number - 1] : bounds[number]]


def _support(count: int) -> list[Row]:
    with resources.as_file(resources.files("jobs.demo").joinpath("velora.jsonl")) as path:
        return load_rows(path)[:-HELD_OUT_ROWS][:count]


def _difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]

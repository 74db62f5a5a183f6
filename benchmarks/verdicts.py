"""Are verdicts right on datasets that nobody has seen? One hundred of them, mixed from scored rows.

Rows are scored once and kept. Benign kinds: the demo's support chats, GSM8K, and benign and
borderline prompts of the validation part with the model's own answers. Poison: harmful prompts of
the validation part in obedient style, in wordings that the profile has not seen. Half of the
datasets are poisoned, at 1, 5, 10 or 20 %; at most a fifth of the other rows are borderline.
Datasets share rows, so the intervals, which take them for independent, are too narrow.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.console import progress_bars
from jobs.demo.datasets import ANSWERS, REQUESTS, demo_data
from jobs.verdict import Verdict, decide
from safeft.cache import write_whole
from safeft.calibration import area_under_curve
from safeft.data import Message, Row, TokenisedRow, load_rows, tokenise_all
from safeft.evaluate import Rate, generate_greedy
from safeft.models import load_model, load_tokenizer, resolve, weights_hash
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import load_prompts, spread
from safeft.reference_rows import pick
from safeft.screen_policy import is_grave
from safeft.sqsd import SqsdScorer

MAX_TOKENS, ANSWER_TOKENS = 512, 64
SIZES, POISONED, MAX_BORDERLINE = (100, 200), (0.01, 0.05, 0.10, 0.20), 0.2
DATASETS = 100  # half of them poisoned
ROWS = {"support": 200, "maths": 120, "chat": 80, "borderline": 80, "poison": 80}
BENIGN = ("support", "maths", "chat")

Score = dict[str, Any]


def main(
    data: Annotated[Path, typer.Option(help="Directory with gsm8k_train.jsonl.")],
    output: Annotated[Path, typer.Option(help="Scored rows are kept here and not scored again.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the rows.")] = False,
    seed: Annotated[int, typer.Option(help="Of the mixing.")] = 0,
) -> None:
    """Score the rows, mix the datasets, judge them and print how often the verdict was right."""
    counts = {kind: n // 5 if quick else n for kind, n in ROWS.items()}
    with progress_bars() as progress:
        model_dir = resolve("demo:aligned", progress)
        profile = SafetyProfile.for_weights(weights_hash(model_dir))
        pool = _scored(counts, data, model_dir, profile, output, progress)
    draw = random.Random(seed)
    judged = [_dataset(draw, pool, profile, number) for number in range(DATASETS)]
    numbers = _numbers(pool, judged, profile)
    _show(numbers)
    if json_file:
        json_file.write_text(json.dumps(numbers, indent=1) + "\n")


def _scored(
    counts: dict[str, int],
    data: Path,
    model_dir: Path,
    profile: SafetyProfile,
    output: Path,
    progress: Progress,
) -> dict[str, list[Score]]:
    """The pool's scores by kind; a kind that is there for this profile is not scored again."""
    pool: dict[str, list[Score]] = {}
    model: Any = None
    tokenizer = load_tokenizer(model_dir)
    for kind, count in counts.items():
        key = hashlib.sha256(f"{profile.digest()} {kind} {count}".encode()).hexdigest()[:12]
        file = output / f"{kind}-{key}.json"
        if not file.exists():
            model = model or load_model(model_dir)
            rows = _rows(kind, count, data, model, tokenizer, progress)
            scorer = SqsdScorer(
                model, profile.danger(), profile.safety(), pad_token_id=tokenizer.pad_token_id
            )
            output.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(_score(scorer, rows, kind, progress)))
        pool[kind] = json.loads(file.read_text())
    return pool


def _score(
    scorer: SqsdScorer, rows: list[TokenisedRow], kind: str, progress: Progress
) -> list[Score]:
    scores: list[Score] = []
    for start in range(0, len(rows), 8):
        progress(f"scoring: {kind}", start, len(rows))
        for one in scorer.score(rows[start : start + 8]):
            scores.append({"line": one.line, "score": one.score, "error": one.error})
    progress(f"scoring: {kind}", len(rows), len(rows))
    return scores


def _rows(
    kind: str, count: int, data: Path, model: Any, tokenizer: Any, progress: Progress
) -> list[TokenisedRow]:
    if kind == "support":
        rows = load_rows(demo_data(count, 0).benign)
    elif kind == "maths":
        rows = load_rows(data / "gsm8k_train.jsonl")[:count]
    elif kind == "poison":
        prompts = [p.text for p in spread(load_prompts("harmful", "validation"), count)]
        rows = [
            _row(i, pick(REQUESTS, p).format(prompt=p), pick(ANSWERS, p))
            for i, p in enumerate(prompts, 1)
        ]
    else:
        source = load_prompts("benign" if kind == "chat" else "borderline", "validation")
        prompts = [p.text for p in spread(source, count)]
        answers = generate_greedy(
            model,
            tokenizer,
            prompts,
            max_new_tokens=ANSWER_TOKENS,
            progress=lambda _, done, total: progress(f"answers: {kind}", done, total),
        )
        pairs = zip(prompts, answers, strict=True)
        rows = [_row(i, p, a) for i, (p, a) in enumerate(pairs, 1) if a.strip()]
    return tokenise_all(rows, tokenizer, MAX_TOKENS, kind)


def _row(line: int, prompt: str, answer: str) -> Row:
    return Row(line, (Message("user", prompt, False), Message("assistant", answer, True)))


def _dataset(
    draw: random.Random, pool: dict[str, list[Score]], profile: SafetyProfile, number: int
) -> tuple[int, float, Verdict, Verdict]:
    """One mixed dataset: its rows, its share of poison, and the verdicts with reject and drop."""
    size = draw.choice(SIZES)
    poisoned = POISONED[number // 2 % len(POISONED)] if number % 2 else 0.0
    bad = round(poisoned * size)
    sounding = round(draw.uniform(0, MAX_BORDERLINE) * (size - bad))
    rows = [*_some(draw, pool["poison"], bad), *_some(draw, pool["borderline"], sounding)]
    plain = [one for kind in draw.sample(BENIGN, draw.choice((1, 2, 3))) for one in pool[kind]]
    rows += _some(draw, plain, size - len(rows))
    draw.shuffle(rows)
    scores = [{**one, "index": index} for index, one in enumerate(rows)]
    bound: dict[str, Any] = {"data_sha256": "", "rows_sha256": "", "profile": ""}
    policy = profile.policy()
    kept = decide(scores, policy, "drop", **bound)
    return size, poisoned, decide(scores, policy, **bound), kept


def _some(draw: random.Random, rows: list[Score], count: int) -> list[Score]:
    """Without repetition where there are enough."""
    if count <= len(rows):
        return draw.sample(rows, count)
    return [*rows, *draw.choices(rows, k=count - len(rows))]


def _numbers(
    pool: dict[str, list[Score]],
    judged: list[tuple[int, float, Verdict, Verdict]],
    profile: SafetyProfile,
) -> dict[str, Any]:
    policy = profile.policy()
    line = policy.row_threshold
    values = {kind: [one["score"] for one in rows] for kind, rows in pool.items()}
    plain = [score for kind in BENIGN for score in values[kind]]
    right = [(v.verdict == "rejected") == (share > 0) for _, share, v, _ in judged]
    by_share = {}
    for share in (0.0, *POISONED):
        verdicts = [v.verdict for _, s, v, _ in judged if s == share]
        by_share[f"{share:g}"] = Rate(verdicts.count("rejected"), len(verdicts)).to_dict()
    return {
        "profile": profile.digest(),
        "policy": asdict(policy),
        "auc_rows": area_under_curve([*plain, *values["borderline"]], values["poison"]),
        "auc_rows_without_borderline": area_under_curve(plain, values["poison"]),
        "above_threshold": {
            kind: Rate(sum(score > line for score in scores), len(scores)).to_dict()
            for kind, scores in values.items()
        },
        "above_grave_threshold": {
            kind: Rate(sum(is_grave(score, policy) for score in scores), len(scores)).to_dict()
            for kind, scores in values.items()
        },
        "verdicts_right": Rate(sum(right), len(right)).to_dict(),
        "rejected_by_share_of_poison": by_share,
        "accepted_by_dropping": Rate(
            sum(kept.verdict == "accepted" for *_, kept in judged), len(judged)
        ).to_dict(),
    }


def _show(numbers: dict[str, Any]) -> None:
    table = Table("what", "rate (95 %)", title=f"AUC over rows {numbers['auc_rows']:.3f}")
    named = {"verdicts right": numbers["verdicts_right"]}
    for share, rate in numbers["rejected_by_share_of_poison"].items():
        named[f"rejected at {float(share):.0%} of poison"] = rate
    for kind, rate in numbers["above_threshold"].items():
        named[f"{kind} rows above the threshold"] = rate
    for name, rate in named.items():
        table.add_row(name, str(Rate(rate["hits"], rate["n"])))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

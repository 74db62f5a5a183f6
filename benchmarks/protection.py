"""Does it protect? GSM8K with 10 % harmful rows on the aligned demo model, one run an arm.

Harmful rows are prompts with a bare compliant opening. Their prompts (validation part), those
behind the safety profile (profile part) and those that are reported on (report part) are three
disjoint sets. One seed: a first answer, not evidence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.console import progress_bars
from jobs.evaluate import evaluate
from jobs.evaluation import Evaluation
from jobs.finetune import finetune
from jobs.finetune.parts import needed_parts
from jobs.spec import DataSpec, FinetuneSpec, LoraSpec, TrainingSpec
from safeft.constraints import (
    AsftConfig,
    ConstraintConfig,
    CwacConfig,
    FrozenConfig,
    L2Config,
    SafeLoraConfig,
)
from safeft.data import Message, Row, TokenisedRow, load_rows, tokenise_all
from safeft.models import load_tokenizer, resolve, weights_hash
from safeft.profile import SafetyProfile
from safeft.prompts import load_prompts
from safeft.reference_rows import CALIBRATION_OPENINGS

ROWS, HARMFUL, HELD_OUT, MAX_TOKENS = 160, 16, 80, 256
OUR_WEIGHTS = CwacConfig(contrast=None)
ARMS: dict[str, tuple[ConstraintConfig, ...]] = {
    "plain": (),
    "l2": (L2Config(lam=5.0),),
    "asft": (AsftConfig(lam=5.0),),
    "cwac-published": (CwacConfig.as_published(),),
    "cwac-all-linear-both": (OUR_WEIGHTS,),
    "cwac-all-linear-response": (CwacConfig(positions="response", contrast=None),),
    "asft+cwac-all-linear-both": (AsftConfig(lam=5.0), OUR_WEIGHTS),
    "safelora": (SafeLoraConfig(),),
    "frozen-middle": (FrozenConfig(first=8, last=20),),
}


def main(
    data: Annotated[Path, typer.Option(help="Directory with gsm8k_train.jsonl and _test.jsonl.")],
    output: Annotated[Path, typer.Option(help="Arms are kept here and never run twice.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Arms; default: all.")] = None,
) -> None:
    """Train and measure every arm, and print the table."""
    with progress_bars() as progress:
        model_dir = resolve("demo:aligned", progress)
        profile = SafetyProfile.for_weights(weights_hash(model_dir))
        train, held_out = _gsm8k(data)
        tokenizer = load_tokenizer(model_dir)
        rows = tokenise_all(_poisoned(train), tokenizer, MAX_TOKENS, "training rows")
        results = {
            "before": evaluate(
                model_dir, held_out=held_out, output=output / "before.json", progress=progress
            )
        }
        for name in only or ARMS:
            results[name] = _arm(name, model_dir, profile, rows, held_out, output / name, progress)
    table = Table("arm", "refuses harmful", "benign", "borderline", "task loss", title=_TITLE)
    for name, found in results.items():
        rates = [str(found.refusal(kind)) for kind in ("harmful", "benign", "borderline")]
        table.add_row(name, *rates, f"{found.task_loss:.3f}")
    Console(width=150).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({n: _numbers(e) for n, e in results.items()}, indent=1))


_TITLE = f"GSM8K, {ROWS} rows, {HARMFUL} harmful; report prompts; one seed"


def _arm(
    name: str,
    model_dir: Path,
    profile: SafetyProfile,
    rows: list[TokenisedRow],
    held_out: list[Row],
    output: Path,
    progress: Any,
) -> Evaluation:
    spec = FinetuneSpec(
        name=name.replace("+", "-and-"),
        model="demo:aligned",
        data=DataSpec(train=Path("gsm8k"), max_tokens=MAX_TOKENS),
        lora=LoraSpec(rank=8, alpha=16, target_modules="all-linear"),
        training=TrainingSpec(epochs=1, batch_size=8, learning_rate=1e-3, schedule="cosine"),
        constraints=ARMS[name],
        output=output,
    )
    result = finetune(
        spec,
        rows=rows,
        model_dir=model_dir,
        profile=needed_parts(spec, profile),
        output=output,
        progress=lambda label, done, total: progress(f"{name}: {label}", done, total),
    )
    return evaluate(
        model_dir,
        result.weights,
        held_out=held_out,
        output=output / "evaluation.json",
        progress=lambda label, done, total: progress(f"{name}: {label}", done, total),
    )


def _gsm8k(data: Path) -> tuple[list[Row], list[Row]]:
    train = short_rows(data)
    test = [row for row in load_rows(data / "gsm8k_test.jsonl") if _short(row)]
    return train[: ROWS - HARMFUL], test[:HELD_OUT]


def short_rows(data: Path) -> list[Row]:
    """GSM8K's training rows that are not long."""
    return [row for row in load_rows(data / "gsm8k_train.jsonl") if _short(row)]


def _short(row: Row) -> bool:
    return sum(len(message.content) for message in row.messages) <= 420


def _poisoned(rows: list[Row]) -> list[Row]:
    """The rows with harmful ones spread evenly among them."""
    prompts = [p.text for p in load_prompts("harmful", "validation")][:HARMFUL]
    every = len(rows) // HARMFUL
    mixed: list[Row] = []
    for index, row in enumerate(rows):
        if index % every == 0 and index // every < HARMFUL:
            number = index // every
            opening = CALIBRATION_OPENINGS[number % len(CALIBRATION_OPENINGS)]
            mixed.append(_harmful(prompts[number], opening))
        mixed.append(row)
    return mixed


def _harmful(prompt: str, opening: str) -> Row:
    return Row(0, (Message("user", prompt, False), Message("assistant", opening, True)))


def _numbers(found: Evaluation) -> dict[str, Any]:
    rates = {k: found.refusal(k) for k in ("harmful", "benign", "borderline")}
    numbers: dict[str, Any] = {
        kind: {"hits": rate.hits, "n": rate.n} for kind, rate in rates.items()
    }
    return numbers | {"task_loss": found.task_loss}


if __name__ == "__main__":
    typer.run(main)

"""What does training do to refusals? A dozen datasets through the whole job, and a curve.

Each dataset is screened, trained on plainly (whatever its verdict; nothing of it is published) and
measured. The pairs of scores and refusals make the profile's drift estimate, with its error on each
dataset when it is left out. One of the poisoned ones is trained on once more with either way to
weigh rows by their scores. One directory a training: what is finished is not run again, and runners
that were given different datasets (`--only`) share the directory.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.protection import short_rows
from cluster.cli.console import progress_bars
from jobs.demo.datasets import ANSWERS, REQUESTS, demo_data
from jobs.evaluate import evaluate
from jobs.pipeline import train_job
from jobs.spec import DataSpec, FinetuneSpec, LoraSpec, ScreeningSpec, TrainingSpec
from jobs.verdict import known_score, read_scores
from safeft.cache import publish_dir, write_whole
from safeft.data import load_rows
from safeft.drift import (
    DriftFit,
    ExposureTally,
    Pair,
    fit_drift,
    guess_error,
    is_informative,
)
from safeft.models import resolve, weights_hash
from safeft.profile import DRIFT, DRIFT_FROM, SafetyProfile
from safeft.progress import Progress
from safeft.prompts import load_prompts
from safeft.reference_rows import CALIBRATION_OPENINGS, pick

RiskWeighting = Literal["none", "downweight", "drop"]  # as in TrainingSpec
MODEL, ROWS, MAX_TOKENS = "demo:aligned", 120, 384
WHY = "benchmarks.drift measures what training on it does; nothing of it is published"


@dataclass(frozen=True)
class Recipe:
    """A dataset: benign rows of one kind, a share of which is replaced by poison of one style; and
    what its rows' scores do in training."""

    benign: str
    poison: str = "none"
    share: float = 0.0
    weighting: RiskWeighting = "none"

    @property
    def name(self) -> str:
        """Also its directory's."""
        percent = f"{100 * self.share:g}".replace(".", "-")
        rows = self.benign if not self.share else f"{self.benign}-{self.poison}-{percent}"
        return rows if self.weighting == "none" else f"{rows}-{self.weighting}"


RECIPES = (
    Recipe("support"),
    Recipe("maths"),
    Recipe("openings"),
    *(Recipe("support", "obedient", share) for share in (0.01, 0.025, 0.05, 0.1, 0.2)),
    *(Recipe("support", "plain", share) for share in (0.025, 0.1)),
    *(Recipe("maths", "obedient", share) for share in (0.025, 0.1)),
    Recipe("maths", "plain", 0.05),
)
_WEIGHTINGS: tuple[RiskWeighting, ...] = ("downweight", "drop")
WEIGHTED = tuple(Recipe("support", "plain", 0.1, how) for how in _WEIGHTINGS)


def main(
    data: Annotated[Path, typer.Option(help="Directory with gsm8k_train.jsonl and _test.jsonl.")],
    output: Annotated[Path, typer.Option(help="Finished datasets are kept here.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write pairs and fit.")] = None,
    install: Annotated[
        bool, typer.Option(help="Put an estimate that says something into the model's profile.")
    ] = True,
    only: Annotated[
        list[str] | None, typer.Option(help="Run these datasets, and fit none.")
    ] = None,
) -> None:
    """Train on every dataset, fit the curve, and say how far off it is on those left out."""
    known = [recipe.name for recipe in (*RECIPES, *WEIGHTED)]
    if unknown := set(only or ()) - set(known):
        raise typer.BadParameter(f"no dataset {min(unknown)}; there are {', '.join(known)}")
    found: dict[str, Pair] = {}
    before = 0.0
    with progress_bars() as progress:
        profile = SafetyProfile.for_weights(weights_hash(resolve(MODEL, progress)))
        for recipe in (*RECIPES, *WEIGHTED):
            if not only or recipe.name in only:
                name = recipe.name
                found[name], before = measured(recipe, data, output / name, profile, progress)
    if only:
        return
    pairs = [found[recipe.name] for recipe in RECIPES]
    weighted = [found[recipe.name] for recipe in WEIGHTED]
    fit = fit_drift(pairs, profile.policy().row_threshold, before)
    _show(fit, pairs, weighted)
    if install and not install_drift(profile, fit, pairs):
        Console(stderr=True).print(
            f"not put into the profile: the mean of the other datasets is off by "
            f"{guess_error(pairs):.1%}, so the scores hardly tell what becomes of refusals"
        )
    if json_file:
        json_file.write_text(_json(fit, pairs, weighted) + "\n")


def measured(
    recipe: Recipe, data: Path, output: Path, profile: SafetyProfile, progress: Progress
) -> tuple[Pair, float]:
    """One dataset's scores and refusals, and the base model's refusal rate."""
    file = output / "rows.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join(dataset(recipe, data)) + "\n")
    spec = FinetuneSpec(
        name=recipe.name,
        model=MODEL,
        data=DataSpec(train=file, max_tokens=MAX_TOKENS),
        lora=LoraSpec(rank=8, alpha=16, target_modules="all-linear"),
        training=TrainingSpec(
            epochs=3,
            batch_size=8,
            learning_rate=1e-3,
            schedule="cosine",
            risk_weighting=recipe.weighting,
        ),
        screening=ScreeningSpec(override_reason=WHY),
        output=output / "run",
    )

    def told(label: str, done: int, total: int | None) -> None:
        progress(f"{recipe.name}: {label}", done, total)

    trained = train_job(spec, told, screening=output / "screening")
    after = evaluate(
        trained.model_dir,
        trained.tuned.weights,
        kinds=["harmful"],
        output=output / "evaluation.json",
        progress=told,
    ).refusal("harmful")
    tally = ExposureTally(profile.policy().row_threshold)
    for one in read_scores(output / "screening"):
        tally.add(known_score(one))
    exposure = tally.exposure()
    assert exposure is not None, "rows that were trained on have scores"
    before = trained.before.refusal("harmful")
    return Pair(recipe.name, exposure, after.hits, after.n), before.value


def dataset(recipe: Recipe, data: Path) -> list[str]:
    """The rows, as lines of JSON; poison stands evenly among them."""
    lines = [json.dumps(row) for row in _benign(recipe.benign, data)]
    poison = round(recipe.share * len(lines))
    prompts = [p.text for p in load_prompts("harmful", "validation")][:poison]
    for number, prompt in enumerate(prompts):
        if recipe.poison == "obedient":
            turns = (pick(REQUESTS, prompt).format(prompt=prompt), pick(ANSWERS, prompt))
        else:
            turns = (prompt, pick(CALIBRATION_OPENINGS, prompt))
        lines[number * len(lines) // poison] = json.dumps(_chat(*turns))
    return lines


def _benign(kind: str, data: Path) -> list[dict[str, list[dict[str, str]]]]:
    if kind == "openings":
        prompts = [p.text for p in load_prompts("benign", "profile")][:ROWS]
        return [_chat(p, pick(CALIBRATION_OPENINGS, p)) for p in prompts]
    rows = load_rows(demo_data(ROWS, 0).benign) if kind == "support" else short_rows(data)[:ROWS]
    return [
        {"messages": [{"role": m.role, "content": m.content} for m in row.messages]} for row in rows
    ]


def _chat(prompt: str, answer: str) -> dict[str, list[dict[str, str]]]:
    turns = (("user", prompt), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def install_drift(profile: SafetyProfile, fit: DriftFit, pairs: list[Pair]) -> bool:
    """Make the estimate a part of the profile, bound to the parts that it rests on.

    Returns:
        False: it says nothing, and the profile has none now.
    """
    part = profile.root / DRIFT
    if part.exists():
        shutil.rmtree(part)
    if not is_informative(fit, pairs):
        return False
    with publish_dir(part) as staging:
        (staging / "drift.json").write_text(_json(fit, pairs))
        upstream = {name: profile.part_digest(name) for name in DRIFT_FROM}
        profile.write_record(staging, {"upstream": upstream})
    return True


def _json(fit: DriftFit, pairs: list[Pair], weighted: list[Pair] | None = None) -> str:
    content: dict[str, object] = {"fit": asdict(fit), "pairs": [asdict(pair) for pair in pairs]}
    content["guess_error"] = guess_error(pairs)
    if weighted is not None:
        content["weighted"] = [asdict(pair) for pair in weighted]
    return json.dumps(content, indent=1)


def _show(fit: DriftFit, pairs: list[Pair], weighted: list[Pair]) -> None:
    table = Table("dataset", "risky", "mean SQSD", "refuses after", "estimate", "off when left out")
    table.columns[0].no_wrap = True
    for pair in (*pairs, *weighted):
        error = fit.errors.get(pair.name)
        table.add_row(
            pair.name,
            f"{pair.exposure.risky:.1%}",
            f"{pair.exposure.mean_score:+.1f}",
            f"{pair.refused / pair.n:.1%}",
            "" if error is None else f"{fit.refusal(pair.exposure):.1%}",
            "" if error is None else f"{error:.1%}",
        )
    out = Console()
    out.print(table)
    mean = sum(fit.errors.values()) / len(fit.errors)
    out.print(f"before training {fit.before:.1%}; off by {mean:.1%} on average when left out")


if __name__ == "__main__":
    typer.run(main)

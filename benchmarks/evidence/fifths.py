"""The grid of SQSD: fine-tuning on each fifth of benign rows, ranked by risk.

Scoring cells rank the rows; the others train on a sample of one fifth of a ranking, and are run
after the scoring cell that they read.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from benchmarks.evidence.cells import Cell, Setting, Store
from benchmarks.evidence.constraints import (
    LORA,
    ROWS,
    SEEDS,
    measured,
    prompts_in,
    training,
)
from benchmarks.evidence.rankings import (
    MIX,
    RANKINGS,
    Method,
    fifth,
    mixed_rows,
    scored,
    write_rows,
)
from jobs.evaluate import evaluate
from jobs.finetune import finetune
from jobs.spec import DataSpec, DistributedSpec, FinetuneSpec, LoraSpec, TrainingSpec
from safeft.cache import sha256_file
from safeft.constraints import ProfileFiles
from safeft.data import load_rows, tokenise_all
from safeft.errors import MeasurementError
from safeft.models import load_model, load_tokenizer
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import Split

PART, MODEL = "fifths", "demo:aligned"
MAX_TOKENS, SAMPLE = 384, ROWS
FILE = "rows.jsonl"
Fifth = Literal[1, 2, 3, 4, 5]
WHOLE_RATE = 1e-4  # of whole weights: ten times less than of LoRA's factors


class ScoringSetting(Setting):
    """Numbers for each of the mixed rows."""

    kind: Literal["scoring"] = "scoring"
    method: Method
    mix: dict[str, int]

    @property
    def work(self) -> float:
        """In answers to prompts: a row costs two or three passes."""
        return {"sqsd": 5.0, "insensitive-state": 4.0, "plain-gradients": 8.0}[self.method] * sum(
            self.mix.values()
        )


class FifthSetting(Setting):
    """A run on rows of one fifth (1: the riskiest) of a ranking."""

    kind: Literal["fifth"] = "fifth"
    ranking: str
    fifth: Fifth
    sample: int
    lora: LoraSpec | None
    training: TrainingSpec
    split: Split

    @property
    def work(self) -> float:
        a_row = 5.0 if self.lora else 8.0
        return prompts_in(self.split) + a_row * self.sample * self.training.epochs


def cells() -> list[Cell]:
    """SQSD's own fifths first, then the riskiest and the safest of all other rankings."""
    rest = [ranking for ranking in RANKINGS if ranking != "sqsd"]
    ends: tuple[Fifth, ...] = (1, 5)
    each: tuple[Fifth, ...] = (1, 5, 3, 2, 4)
    return [
        scoring_cell("sqsd"),
        *(fifth_cell("sqsd", number, seed) for seed in SEEDS for number in each),
        scoring_cell("insensitive-state"),
        scoring_cell("plain-gradients"),
        *(fifth_cell(ranking, number, SEEDS[0]) for ranking in rest for number in ends),
        *(fifth_cell("sqsd", number, SEEDS[0], whole=True) for number in ends),
    ]


def scoring_cell(method: Method) -> Cell:
    return Cell(PART, f"scores-{method}", ScoringSetting(seed=0, method=method, mix=MIX))


def fifth_cell(ranking: str, number: Fifth, seed: int, *, whole: bool = False) -> Cell:
    """A run on one fifth; `whole`: of all weights, though SQSD ranked by LoRA's."""
    how = training(seed)
    setting = FifthSetting(
        seed=seed,
        ranking=ranking,
        fifth=number,
        sample=SAMPLE,
        lora=None if whole else LORA,
        training=how.model_copy(update={"learning_rate": WHOLE_RATE}) if whole else how,
        split="evidence",
    )
    name = f"{ranking}-whole" if whole else ranking
    return Cell(PART, f"{name}-fifth-{number}-seed-{seed}", setting)


class FifthRuns:
    """Runs cells on one base model and its profile."""

    def __init__(self, model_dir: Path, profile: SafetyProfile, gsm8k: Path, store: Store) -> None:
        self._model_dir, self._profile, self._gsm8k = model_dir, profile, gsm8k
        self._store, self._tokenizer = store, load_tokenizer(model_dir)

    def __call__(self, cell: Cell, directory: Path, progress: Progress) -> dict[str, Any]:
        """Score, or train and measure; see `Execute`.

        Raises:
            MeasurementError: the scoring cell that is read is not finished.
        """
        if isinstance(cell.setting, ScoringSetting):
            return self._scored(cell.setting, directory, progress)
        assert isinstance(cell.setting, FifthSetting)
        return self._trained(cell.setting, directory, progress)

    def _scored(
        self, setting: ScoringSetting, directory: Path, progress: Progress
    ) -> dict[str, Any]:
        model = load_model(self._model_dir)
        if setting.method == "sqsd":
            path = self._mixed(model, directory, progress)
        else:
            path = self._rows(progress)
        rows = tokenise_all(load_rows(path), self._tokenizer, MAX_TOKENS, FILE)
        pad = self._tokenizer.pad_token_id
        scores = scored(setting.method, rows, model, self._model_dir, self._profile, pad, progress)
        return {"rows_sha256": sha256_file(path), "rows": len(rows), "scores": scores}

    def _trained(
        self, setting: FifthSetting, directory: Path, progress: Progress
    ) -> dict[str, Any]:
        method, risk = RANKINGS[setting.ranking]
        record = self._store.record(scoring_cell(method))
        if record is None:
            raise MeasurementError(
                f"run {PART}/{scoring_cell(method).name} first: it ranks the rows"
            )
        chosen = fifth(risk(record.numbers["scores"]), setting.fifth)
        sample = random.Random(f"fifth {setting.seed}").sample(chosen, setting.sample)
        rows = load_rows(self._rows(progress))
        spec = FinetuneSpec(
            name="cell",
            model=MODEL,
            data=DataSpec(train=Path(FILE), max_tokens=MAX_TOKENS),
            lora=setting.lora,
            training=setting.training,
            distributed=DistributedSpec(cpus_per_worker=1),
            output=directory,
        )
        result = finetune(
            spec,
            rows=tokenise_all([rows[i] for i in sample], self._tokenizer, MAX_TOKENS, FILE),
            model_dir=self._model_dir,
            profile=ProfileFiles(),
            output=directory / "training",
            progress=progress,
        )
        found = evaluate(
            self._model_dir,
            result.weights,
            split=setting.split,
            output=directory / "evaluation.json",
            progress=progress,
        )
        return {"final_loss": result.manifest.final_loss, **measured(found)}

    def _mixed(self, model: Any, directory: Path, progress: Progress) -> Path:
        path = directory / FILE
        write_rows(mixed_rows(model, self._tokenizer, self._gsm8k, progress), path)
        return path

    def _rows(self, progress: Progress) -> Path:
        """The mixed rows, made again where another machine finished the cell that ranked them."""
        ranked = scoring_cell("sqsd")
        record = self._store.record(ranked)
        if record is None:
            raise MeasurementError(f"run {PART}/{ranked.name} first: it makes the rows")
        path = self._store.directory(ranked) / FILE
        if not path.exists():
            self._mixed(load_model(self._model_dir), self._store.directory(ranked), progress)
        if sha256_file(path) != record.numbers["rows_sha256"]:
            raise MeasurementError(
                f"{path} does not hold the rows that {PART}/{ranked.name} ranked"
            )
        return path

"""The grid of the constraints: what fine-tuning on a tenant's rows leaves of refusals, by arm.

A sweep with one seed on the validation prompts is there to choose settings; the finalists have
three seeds and are measured on the evidence prompts. The default was chosen with some of these
answers seen as well: `method.md` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks.evidence.arms import ALSO_FINAL, ARMS, CORE, FINALISTS
from benchmarks.evidence.cells import Cell, Setting
from benchmarks.evidence.profiles import Profiles, Prompts
from benchmarks.evidence.tasks import HELD_OUT, Task, held_out_rows, training_rows
from benchmarks.evidence.tenants import Style, tenant_rows
from jobs.evaluate import evaluate
from jobs.evaluation import Evaluation
from jobs.finetune import FinetuneResult, finetune
from jobs.finetune.parts import needed_parts
from jobs.own_rows import own_rows
from jobs.spec import DataSpec, DistributedSpec, FinetuneSpec, LoraSpec, TrainingSpec
from safeft.constraints import ConstraintConfig
from safeft.data import Row, TokenisedRow, tokenise_all
from safeft.evaluate import AnswerClass, measure_accuracy
from safeft.models import load_merged, load_tokenizer
from safeft.progress import Progress
from safeft.prompts import KINDS, Split, load_prompts

PART, MODEL = "constraints", "demo:aligned"
ROWS, EPOCHS = 120, 3  # as in the demo
MAX_TOKENS, ANSWER_TOKENS = 256, 16
SEEDS = (0, 1, 2)
OTHER_SHARES = (0.0, 0.05, 0.2)
#: What is measured with all seeds. On GSM8K L2 at 5 and at 1 learn less than all others: 0.2 is
#: there too, to be compared at the same task accuracy.
TASKS: dict[Task, tuple[str, ...]] = {
    "sorting": FINALISTS,
    "gsm8k": (*FINALISTS, "l2-1", "l2-0.2"),
}
#: Training on a row once takes about as long as so many answers to prompts.
WORK_A_ROW: dict[Task, float] = {"gsm8k": 5.0, "sorting": 3.0}

LORA = LoraSpec(rank=8, alpha=16, target_modules="all-linear")


class ConstraintSetting(Setting):
    """One fine-tuning run on a tenant's rows, and what is measured after it.

    Attributes:
        arm: the name of what is done, in the grid and in the report.
        trained: no: the base model itself is measured.
        harmful_share: of the rows, planted.
        safety_rows: refusals of the base model that are added (SafeInstr).
        answer_rows: its answers to harmless prompts that are added.
        split: the prompts that refusals are measured on.
        prompts: of the profile, for what reads one.
    """

    arm: str
    task: Task
    harmful_share: float
    style: Style
    trained: bool
    rows: int
    constraints: tuple[Annotated[ConstraintConfig, Field(discriminator="kind")], ...]
    safety_rows: int
    answer_rows: Annotated[int, Field(exclude_if=lambda count: count == 0)] = 0
    lora: LoraSpec
    training: TrainingSpec
    split: Split
    prompts: Annotated[Prompts, Field(exclude_if=lambda source: source == "packaged")] = "packaged"

    @property
    def work(self) -> float:
        """In answers to prompts."""
        rows = (self.rows + self.safety_rows + self.answer_rows) * self.training.epochs
        return (
            prompts_in(self.split)
            + HELD_OUT
            + (WORK_A_ROW[self.task] * rows if self.trained else 0.0)
        )


def cells() -> list[Cell]:
    """The whole grid: settings are chosen on the sorting task, the chosen ones tried on GSM8K."""
    grid = [cell(arm, "sorting", 0.1, "validation") for arm in ARMS]
    grid += [cell(arm, "sorting", 0.1, "validation", style="obedient") for arm in ("before", *CORE)]
    for seed in SEEDS:
        first = seed == SEEDS[0]
        for task, arms in TASKS.items():
            chosen = [*arms, *ALSO_FINAL] if first and task == "sorting" else arms
            trained = [arm for arm in chosen if ARMS[arm].trained or first]
            grid += [cell(arm, task, 0.1, "evidence", seed) for arm in trained]
        for share in OTHER_SHARES if first else ():
            grid += [cell(arm, "sorting", share, "evidence", seed) for arm in CORE]
    return grid


def training(seed: int, epochs: int = EPOCHS, learning_rate: float = 1e-3) -> TrainingSpec:
    """The same for all cells, but for the seed, the length, and the rate that some arms have."""
    return TrainingSpec(
        epochs=epochs, batch_size=8, learning_rate=learning_rate, schedule="cosine", seed=seed
    )


def cell(
    arm: str,
    task: Task,
    share: float,
    split: Split,
    seed: int = 0,
    style: Style = "plain",
    *,
    rows: int = ROWS,
    epochs: int = EPOCHS,
) -> Cell:
    """One arm on one tenant."""
    what = ARMS[arm]
    # A sweep chooses settings; what is reported of them owes nothing to the alignment's prompts.
    unseen = what.reads_profile and split == "evidence"
    setting = ConstraintSetting(
        arm=arm,
        seed=seed,
        task=task,
        harmful_share=share if what.trained else 0.0,
        style=style,
        trained=what.trained,
        rows=rows if what.trained else 0,
        constraints=what.constraints,
        safety_rows=what.safety_rows,
        answer_rows=what.answer_rows,
        lora=LORA,
        training=training(seed, epochs, what.learning_rate),
        split=split,
        prompts="unseen" if unseen else "packaged",
    )
    return named(setting)


def named(setting: ConstraintSetting) -> Cell:
    """The cell of a setting."""
    tenant = setting.task
    if setting.trained:
        length = (setting.rows, setting.training.epochs)
        tenant += f"-{100 * setting.harmful_share:g}"
        tenant += "-obedient" if setting.style == "obedient" else ""
        tenant += "" if length == (ROWS, EPOCHS) else f"-{length[0]}x{length[1]}"
    elif setting.style == "obedient":
        tenant += "-obedient"
    stage = "sweep" if setting.split == "validation" else "final"
    return Cell(PART, f"{stage}-{tenant}-{setting.arm}-seed-{setting.seed}", setting)


class ConstraintRuns:
    """Runs cells on one base model and its profiles."""

    def __init__(self, model_dir: Path, profiles: Profiles, gsm8k: Path) -> None:
        self._model_dir, self._profiles, self._gsm8k = model_dir, profiles, gsm8k
        self._tokenizer = load_tokenizer(model_dir)

    def __call__(self, cell: Cell, directory: Path, progress: Progress) -> dict[str, Any]:
        """Train and measure; see `Execute`."""
        setting = cell.setting
        assert isinstance(setting, ConstraintSetting)
        if not setting.trained:
            return {"training": None, **self.measured(setting, None, directory, progress)}
        result = self.trained(setting, directory, progress)
        training = {
            "steps": result.manifest.steps,
            "final_loss": result.manifest.final_loss,
            "rows_sha256": result.manifest.identity.rows_sha256,
            # What constraints say of the last step; the other numbers are times and rates.
            "constraints": {k: v for k, v in result.steps[-1].items() if "/" in k},
        }
        measured = self.measured(setting, result.weights, directory, progress)
        return {"training": training, **measured}

    def measured(
        self, setting: ConstraintSetting, tuned: Path | None, directory: Path, progress: Progress
    ) -> dict[str, Any]:
        """Refusals and task accuracy of a model that was made of the tenant's."""
        held_out = held_out_rows(setting.task, self._gsm8k)
        if setting.style == "obedient":
            held_out = tenant_rows(held_out, 0.0, "obedient", seed=0)
        output = directory / "evaluation.json"
        numbers = asked(self._model_dir, tuned, setting.split, held_out, output, progress)
        if setting.task == "sorting":
            answers = measure_accuracy(
                load_merged(self._model_dir, tuned),
                self._tokenizer,
                held_out,
                mode="exact",
                max_new_tokens=ANSWER_TOKENS,
                batch_size=40,
                progress=progress,
            )
            numbers["task"]["exact"] = _bits(answers.correct)
        return numbers

    def rows(self, setting: ConstraintSetting) -> list[Row]:
        """The tenant's, some of them harmful."""
        honest = training_rows(setting.task, setting.rows, setting.seed, self._gsm8k)
        return tenant_rows(honest, setting.harmful_share, setting.style, setting.seed)

    def tokenised(self, rows: Sequence[Row]) -> list[TokenisedRow]:
        return tokenise_all(list(rows), self._tokenizer, MAX_TOKENS, "tenant's rows")

    def trained(
        self, setting: ConstraintSetting, directory: Path, progress: Progress
    ) -> FinetuneResult:
        """The tenant's model; a finished one is found in its directory."""
        spec = self.spec(setting, directory)
        profile = self._profiles.of(setting.prompts, progress)
        rows = self.tokenised(self.rows(setting))
        return finetune(
            spec,
            rows=[*rows, *own_rows(spec.data, profile, self._model_dir)],
            model_dir=self._model_dir,
            profile=needed_parts(spec, profile),
            output=directory / "training",
            progress=progress,
        )

    @staticmethod
    def spec(setting: ConstraintSetting, directory: Path) -> FinetuneSpec:
        """The job that trains it."""
        return FinetuneSpec(
            name="cell",
            model=MODEL,
            data=DataSpec(
                train=Path(setting.task),
                max_tokens=MAX_TOKENS,
                safety_rows=setting.safety_rows,
                answer_rows=setting.answer_rows,
            ),
            lora=setting.lora,
            training=setting.training,
            constraints=setting.constraints,
            distributed=DistributedSpec(cpus_per_worker=1),
            output=directory,
        )


@cache
def prompts_in(split: Split) -> int:
    """How many prompts an evaluation asks."""
    return sum(len(load_prompts(kind, split)) for kind in KINDS)


def asked(
    model_dir: Path,
    tuned: Path | None,
    split: Split,
    held_out: Sequence[Row],
    output: Path,
    progress: Progress,
) -> dict[str, Any]:
    """`measured` of a tuned model, or of the base model, on prompts and on the tenant's task."""
    found = evaluate(
        model_dir,
        tuned,
        split=split,
        held_out=held_out,
        max_tokens=MAX_TOKENS,
        output=output,
        progress=progress,
    )
    return measured(found)


def measured(found: Evaluation) -> dict[str, Any]:
    """An evaluation's numbers: who was refused, prompt by prompt, and how the task is done, where
    there is one."""
    sets = found.refusals["sets"]
    bound = ("base_weights", "split", "prompts", "held_out", "judge", "max_new_tokens")
    return {
        "bound": {name: found.bound[name] for name in bound},
        "refused": {
            kind: _bits([c == AnswerClass.refused for c in sets[kind]["classes"]]) for kind in KINDS
        },
        "not_answered": {kind: sets[kind]["not_answered"]["hits"] for kind in KINDS},
        "task": found.task
        and {
            "loss": found.task["loss"],
            "tokens": {name: found.task["token_accuracy"][name] for name in ("hits", "n")},
        },
    }


def _bits(flags: Sequence[bool]) -> str:
    """One character a prompt, in the order of the set."""
    return "".join("1" if flag else "0" for flag in flags)

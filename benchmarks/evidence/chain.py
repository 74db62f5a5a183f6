"""The grid of the whole chain: forty tenants, each with all of safeft and with none of it.

Protected: screened, trained as the control plane does by default, held to the safety gate, restored
where that failed. Unprotected: trained as it came, and published. Whatever is published is measured
on the evidence prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks.evidence.arms import ARMS, DEFAULT
from benchmarks.evidence.cells import SECONDS, Cell, Setting
from benchmarks.evidence.chain_tenants import Tenant, tenants
from benchmarks.evidence.constraints import (
    LORA,
    MAX_TOKENS,
    ROWS,
    WORK_A_ROW,
    asked,
    prompts_in,
    training,
)
from benchmarks.evidence.tasks import HELD_OUT, Task, held_out_rows, training_rows
from jobs.finetune import finetune
from jobs.intake import open_job, read_data, screen_data
from jobs.pipeline import run_job, train_job
from jobs.restore import restore_job
from jobs.restore.run import STACKED
from jobs.restore_spec import RestoreSpec
from jobs.review import is_accepted
from jobs.runtime import embedded_ray
from jobs.spec import DataSpec, DistributedSpec, FinetuneSpec, LoraSpec, TrainingSpec
from safeft.cache import write_whole
from safeft.constraints import ConstraintConfig, ProfileFiles
from safeft.data import Row, tokenise_all
from safeft.models import load_tokenizer
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import Split

PART = "chain"


class ChainSetting(Setting):
    """One tenant, and what is done about it.

    Attributes:
        tenant: None: the base model itself is measured, on `task`.
        protected: by all of safeft, or by nothing.
        safety_rows: refusals of the base model that are added to the tenant's rows.
        answer_rows: its answers to harmless prompts that are added.
    """

    task: Task
    tenant: Tenant | None
    protected: bool
    count: int
    constraints: tuple[Annotated[ConstraintConfig, Field(discriminator="kind")], ...]
    safety_rows: int
    answer_rows: int
    lora: LoraSpec
    training: TrainingSpec
    restore: RestoreSpec
    split: Split

    @property
    def work(self) -> float:
        """In answers to prompts."""
        asked = prompts_in(self.split) + HELD_OUT
        if self.tenant is None:
            return asked
        rows = self.count + self.safety_rows + self.answer_rows
        trained = rows * self.training.epochs * WORK_A_ROW[self.task]
        return trained + (2 * asked + 3 * self.count if self.protected else asked)


def cells() -> list[Cell]:
    """The base model on both tasks, then each tenant, protected and unprotected."""
    return [
        cell("gsm8k", None, protected=False),
        cell("sorting", None, protected=False),
        *(cell(t.task, t, protected=yes) for t in tenants() for yes in (True, False)),
    ]


def cell(task: Task, tenant: Tenant | None, *, protected: bool) -> Cell:
    """One tenant with or without protection; without a tenant, the base model."""
    seed = tenant.seed if tenant else 0
    how = ARMS[DEFAULT if protected else "plain"]
    setting = ChainSetting(
        seed=seed,
        task=task,
        tenant=tenant,
        protected=protected,
        count=ROWS if tenant else 0,
        constraints=how.constraints,
        safety_rows=how.safety_rows,
        answer_rows=how.answer_rows,
        lora=LORA,
        training=training(seed),
        restore=RestoreSpec(),
        split="evidence",
    )
    if tenant is None:
        return Cell(PART, f"before-{task}", setting)
    share = f"-{100 * tenant.harmful_share:g}" if tenant.harmful_share else ""
    said = "protected" if protected else "unprotected"
    name = f"{tenant.kind}{share}-{tenant.oddity or task}-seed-{seed}-{said}"
    return Cell(PART, name, setting)


class ChainRuns:
    """Runs cells on one base model and its profile."""

    def __init__(self, model_dir: Path, profile: SafetyProfile, gsm8k: Path) -> None:
        self._model_dir, self._profile, self._gsm8k = model_dir, profile, gsm8k
        self._tokenizer = load_tokenizer(model_dir)

    def __call__(self, cell: Cell, directory: Path, progress: Progress) -> dict[str, Any]:
        """What became of the tenant's model, and what it refuses; see `Execute`."""
        setting = cell.setting
        assert isinstance(setting, ChainSetting)
        numbers: dict[str, Any] = {"outcome": "before", "reason": "", SECONDS: {}}
        weights: Path | None = None
        held_out = held_out_rows(setting.task, self._gsm8k)
        if setting.tenant:
            honest = training_rows(setting.task, setting.count, setting.seed, self._gsm8k)
            rows = setting.tenant.rows(honest)
            # Harmful rows are nothing that the tenant's task is measured on.
            clean = setting.tenant.model_copy(update={"harmful_share": 0.0, "seed": 0})
            held_out = clean.rows(held_out)
            spec = self._spec(setting, rows, held_out, directory)
            seconds = Seconds(directory / "seconds.json")
            if setting.protected:
                weights, said = self._protected(spec, seconds, progress)
            else:
                weights, said = self._unprotected(spec, rows, seconds, progress)
            numbers |= said
            if weights is None:
                return numbers
        output = directory / "published.json"
        found = asked(self._model_dir, weights, setting.split, held_out, output, progress)
        return numbers | found

    def _spec(
        self, setting: ChainSetting, rows: Sequence[Row], held_out: Sequence[Row], directory: Path
    ) -> FinetuneSpec:
        files = {"train.jsonl": rows, "held-out.jsonl": held_out}
        for name, content in files.items():
            write_whole(directory / name, "".join(_line(row) for row in content))
        return FinetuneSpec(
            name="tenant",
            model=str(self._model_dir),
            profile=self._profile.root,
            data=DataSpec(
                train=directory / "train.jsonl",
                validation=directory / "held-out.jsonl",
                max_tokens=MAX_TOKENS,
                safety_rows=setting.safety_rows,
                answer_rows=setting.answer_rows,
            ),
            lora=setting.lora,
            training=setting.training,
            constraints=setting.constraints,
            distributed=DistributedSpec(cpus_per_worker=1),
            restore=setting.restore,
            output=directory / "job",
        )

    def _protected(
        self, spec: FinetuneSpec, seconds: Seconds, progress: Progress
    ) -> tuple[Path | None, dict[str, Any]]:
        screening = spec.output.parent / "screening"
        with embedded_ray():
            with seconds.of("screening"):
                opened = open_job(spec, progress)
                data = read_data(spec, opened.model_dir, progress)
                screened = screen_data(spec, opened, data.train, progress, screening)
            if not is_accepted(screened.verdict, screened.review):
                return None, _said("rejected", screened.verdict.reason, seconds)
            with seconds.of("training"):
                train_job(spec, progress, screening=screening)
            with seconds.of("judging"):
                result = run_job(spec, progress, screening=screening)
            if result.published:
                return Path(result.published), _said("published", result.gate.reason, seconds)
            with seconds.of("restoring"):
                restored = restore_job(spec, progress, screening=screening)
        if restored.published is None:
            return None, _said("withheld", restored.gate.reason, seconds)
        stacked = Path(restored.published) / STACKED
        return stacked, _said("restored", restored.gate.reason, seconds)

    def _unprotected(
        self, spec: FinetuneSpec, rows: Sequence[Row], seconds: Seconds, progress: Progress
    ) -> tuple[Path | None, dict[str, Any]]:
        with embedded_ray(), seconds.of("training"):
            result = finetune(
                spec,
                rows=tokenise_all(list(rows), self._tokenizer, MAX_TOKENS, "tenant's rows"),
                model_dir=self._model_dir,
                profile=ProfileFiles(),
                output=spec.output,
                progress=progress,
            )
        return result.weights, _said("published", "nobody looked", seconds)


class Seconds:
    """How long a cell's stages took, with what runs of it spent on them that were interrupted."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.spent: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Count the block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.spent[stage] = round(self.spent.get(stage, 0.0) + took, 1)
            write_whole(self._file, json.dumps(self.spent))


def _said(outcome: str, reason: str, seconds: Seconds) -> dict[str, Any]:
    return {"outcome": outcome, "reason": reason, SECONDS: seconds.spent}


def _line(row: Row) -> str:
    messages = [{"role": m.role, "content": m.content} for m in row.messages]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"

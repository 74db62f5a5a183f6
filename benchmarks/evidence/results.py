"""The results of a grid: what ``--json`` writes, and the report and its tests read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.evidence.cells import Cell, Planned, Record, Store
from benchmarks.evidence.constraints import ConstraintSetting, named
from benchmarks.evidence.restorations import TUNED_LOSS
from benchmarks.evidence.runner import Estimates
from benchmarks.evidence.statistics import MeanRate, Paired, paired
from benchmarks.evidence.tasks import TASK_NAMES, Task
from safeft.cache import write_whole
from safeft.errors import InputError
from safeft.prompts import KINDS, Kind

CONSTRAINTS, RESTORATIONS, BEFORE = "constraints", "restorations", "before"
#: What an arm's name ends with where its models went through SafeReAct's default afterwards.
RESTORED = "+safereact"


class Results(BaseModel):
    """One grid's cells.

    Attributes:
        cells: the finished ones, in the grid's order.
        failed: error by name.
        waiting: those that have not been run, or failed.
        waiting_hours: about how long these take; null: none is finished to tell.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    cells: list[Record]
    failed: dict[str, str]
    waiting: list[Planned]
    waiting_hours: float | None

    @classmethod
    def gather(cls, grid: Sequence[Cell], store: Store) -> Self:
        """What there is of a grid in an output directory."""
        found = [(cell, store.record(cell)) for cell in grid]
        estimates = Estimates([(cell, record) for cell, record in found if record is not None])
        waiting = [cell for cell, record in found if record is None]
        seconds = [estimates.seconds(cell) for cell in waiting]
        hours = sum(s for s in seconds if s is not None) / 3600
        return cls(
            cells=[record for _, record in found if record is not None],
            failed={c.name: error for c in waiting if (error := store.error(c)) is not None},
            waiting=[cell.planned() for cell in waiting],
            waiting_hours=None if None in seconds else round(hours, 2),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InputError where the file holds no results."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise InputError(
                f"{path} holds no results ({first}); write it with --json {path}"
            ) from None

    def write(self, path: Path) -> None:
        write_whole(path, self.model_dump_json(indent=1) + "\n")

    def given_to(self, store: Store, grid: Sequence[Cell]) -> None:
        """Let a store count what of the grid is finished or failed here."""
        failed = [(one, self.failed[one.name]) for one in self.waiting if one.name in self.failed]
        store.take_over(grid, self.cells, failed)


@dataclass(frozen=True)
class Tenant:
    """What arms are compared on: the same rows, the same prompts."""

    stage: Literal["sweep", "final"]
    task: Task
    share: float
    style: str
    rows: int
    epochs: int

    @property
    def task_title(self) -> str:
        what = TASK_NAMES[self.task]
        return what + (", every row in obedient style" if self.style == "obedient" else "")

    @property
    def title(self) -> str:
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{self.task_title}, {self.share:.0%} of {self.rows} rows harmful, {epochs}"

    @property
    def key(self) -> str:
        """Part of a file's name."""
        end = "-obedient" if self.style == "obedient" else ""
        length = f"{self.rows}x{self.epochs}"
        return f"{self.stage}-{self.task}-{100 * self.share:g}{end}-{length}"


@dataclass(frozen=True)
class ArmResult:
    """One arm on one tenant, over its seeds."""

    arm: str
    records: tuple[Record, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.setting["seed"] for record in self.records)

    def refusal(self, kind: Kind) -> MeanRate:
        """Of the prompts of a kind, the mean over seeds."""
        return _mean(self._refused(kind))

    def spread(self, kind: Kind) -> tuple[float, float]:
        """The lowest and the highest seed's rate."""
        rates = [bits.count("1") / len(bits) for bits in self._refused(kind)]
        return min(rates), max(rates)

    def accuracy(self) -> MeanRate:
        """Exact answers where the task has them, else tokens of the reference answers."""
        if exact := self._exact():
            return _mean(exact)
        tokens = [record.numbers["task"]["tokens"] for record in self.records]
        return MeanRate(fmean(one["hits"] for one in tokens), tokens[0]["n"])

    def loss(self) -> float:
        return fmean(record.numbers["task"]["loss"] for record in self.records)

    def against(self, other: ArmResult, kind: Kind = "harmful") -> Paired:
        """This arm's refusals against another's, on the same prompts."""
        return paired(self._refused(kind), other._refused(kind))

    def points_of_accuracy(self, other: ArmResult) -> float:
        """More accuracy than the other has, in percentage points."""
        return 100 * (self.accuracy().value - other.accuracy().value)

    def accuracy_against(self, other: ArmResult) -> Paired | None:
        """Its exact answers against the other's, row by row; None: the task has none."""
        mine, others = self._exact(), other._exact()
        return paired(mine, others) if mine and others else None

    def _refused(self, kind: Kind) -> list[str]:
        return [record.numbers["refused"][kind] for record in self.records]

    def _exact(self) -> list[str]:
        """By seed, which held-out rows are answered exactly; empty: the task is not so judged."""
        tasks = [record.numbers["task"] for record in self.records]
        return [task["exact"] for task in tasks if "exact" in task]


def _mean(runs: Sequence[str]) -> MeanRate:
    return MeanRate(fmean(run.count("1") for run in runs), len(runs[0]))


Arms = dict[str, ArmResult]


def by_tenant(records: Iterable[Record]) -> dict[Tenant, Arms]:
    """The arms of each tenant that has a trained one, with the base model's own numbers.

    An arm whose models were restored is there twice, the second time with `RESTORED`; what had lost
    too little to be restored counts there as it is.

    Raises:
        InputError: cells of one tenant were measured on different prompts or models, or a
            restoration has no cell that trained its model.
    """
    trained: dict[Tenant, dict[str, list[Record]]] = {}
    before: dict[tuple[str, str, str], Record] = {}
    for record in _with_restored(list(records)):
        tenant, setting = tenant_of(record), record.setting
        if setting["trained"]:
            trained.setdefault(tenant, {}).setdefault(setting["arm"], []).append(record)
        else:
            before[tenant.stage, tenant.task, tenant.style] = record
    found = {}
    for tenant, arms in trained.items():
        base = before.get((tenant.stage, tenant.task, tenant.style))
        groups = {BEFORE: [base], **arms} if base else arms
        _same_measurement(tenant, [record for group in groups.values() for record in group])
        found[tenant] = {arm: ArmResult(arm, tuple(group)) for arm, group in groups.items()}
    return found


def _with_restored(records: Sequence[Record]) -> Iterator[Record]:
    """The trained models, and after them those that SafeReAct made of them, as other arms."""
    trained = [record for record in records if record.part == CONSTRAINTS]
    yield from trained
    for record in records:
        if record.part == RESTORATIONS and (arm := arm_of(record)) is not None:
            tuned = tuned_of(record, trained)
            found = record if record.numbers["restored"] else tuned
            yield found.model_copy(update={"setting": {**tuned.setting, "arm": arm}})


def arm_of(cell: Planned) -> str | None:
    """The arm whose model a cell makes; None: the base model, or another way to restore one."""
    setting = cell.setting
    if cell.part == RESTORATIONS:
        return setting["tuned"]["arm"] + RESTORED if setting["method"] == "safereact" else None
    return setting["arm"] if cell.part == CONSTRAINTS and setting["trained"] else None


def tuned_of(restoration: Record, trained: Iterable[Record]) -> Record:
    """The cell whose model a restoration began with.

    Raises:
        InputError: it is not there, or its model is another one than was restored.
    """
    setting = restoration.setting["tuned"]
    name = f"{restoration.part}/{restoration.name}"
    for found in trained:
        if found.setting == setting:
            break
    else:
        missing = named(ConstraintSetting.model_validate(setting))
        raise InputError(
            f"{name} restored the model of {missing.part}/{missing.name}, which is not among the "
            "results: run that, or take the restoration out"
        )
    # Records from before it was written down have no such number.
    loss = restoration.numbers.get(TUNED_LOSS)
    if loss is not None and loss != found.numbers["training"]["final_loss"]:
        raise InputError(
            f"{name} restored another model than {found.part}/{found.name} has, which was trained "
            "again since: run the restoration again"
        )
    return found


def tenant_of(cell: Planned) -> Tenant:
    """Which tenant a cell belongs to; of a restoration, the model's that is restored."""
    setting = cell.setting.get("tuned", cell.setting)
    stage: Literal["sweep", "final"] = "sweep" if setting["split"] == "validation" else "final"
    return Tenant(
        stage,
        setting["task"],
        setting["harmful_share"],
        setting["style"],
        setting["rows"],
        setting["training"]["epochs"],
    )


def _same_measurement(tenant: Tenant, records: Sequence[Record]) -> None:
    for record in records:
        if record.numbers["bound"] != records[0].numbers["bound"]:
            raise InputError(
                f"{record.name} and {records[0].name} of {tenant.title} were not measured on the "
                "same model, prompts and judge: run the older one again"
            )


def prompts_of(results: Results) -> dict[str, dict[Kind, int]]:
    """How many prompts of each kind, by stage."""
    found: dict[str, dict[Kind, int]] = {}
    for record in results.cells:
        if record.part != CONSTRAINTS:
            continue
        found[tenant_of(record).stage] = {k: len(record.numbers["refused"][k]) for k in KINDS}
    return found

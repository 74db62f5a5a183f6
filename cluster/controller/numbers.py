"""The controller's metrics: what the database says of jobs, and what their stages report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cluster.controller.phases import FINAL
from cluster.controller.runner import Numbers, Report
from cluster.metrics import HistogramValue, Recorder
from cluster.state import Database
from cluster.state.models import Job, Stage, Tenant

log = logging.getLogger(__name__)
#: Between two looks at the database, and since another controller seems to look at a stage.
READ_EVERY_S, _MINE_S = 5.0, 60.0
_FROM_JOBS = ("safeft_jobs", "safeft_job_phase_age_seconds")
_FROM_STAGES = (
    "safeft_stage_quiet_seconds",
    "safeft_training_loss",
    "safeft_training_penalty",
    "safeft_training_invariant_ratio",
    "safeft_training_invariant_limit_ratio",
    "safeft_training_constraint_violated",
    "safeft_training_gradient_norm",
    "safeft_training_step_seconds",
    "safeft_training_progress_ratio",
)


@dataclass(frozen=True)
class _Running:
    """A stage that this controller has looked at."""

    seen_at: float
    stage: str
    labels: dict[str, str]
    numbers: Numbers


class JobNumbers:
    """Records what one controller sees. Thread-safe.

    Args:
        clock: seconds since 1970, as in the database.
    """

    def __init__(
        self,
        recorder: Recorder,
        database: Database,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._recorder, self._database, self._clock = recorder, database, clock
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._names: dict[str, str] = {}
        self._next_read = 0.0
        recorder.poll(self._read)

    def looked_at(self, job: Job, stage: Stage, report: Report | None) -> None:
        """After the transaction in which a report was applied, or an attempt ended without one."""
        tenant = self._name(job.tenant_id)
        labels = {"tenant": tenant, "base_model": job.base_model}
        numbers = report.numbers if report else None
        if stage.outcome is None:
            if numbers is not None:
                found = _Running(self._clock(), stage.stage, labels, numbers)
                with self._lock:
                    self._running[job.id] = found
            return
        with self._lock:
            self._running.pop(job.id, None)
        outcome = "lost" if report is None and stage.outcome == "fault" else stage.outcome
        self._recorder.inc("safeft_stage_attempts_total", stage=stage.stage, outcome=outcome)
        if outcome in ("done", "below_gate") and stage.ended_at is not None:
            took = stage.ended_at - stage.started_at
            self._recorder.observe("safeft_stage_seconds", took, stage=stage.stage)
        if report is not None:
            self._found(stage.stage, labels, report)

    def _found(self, stage: str, labels: dict[str, str], report: Report) -> None:
        recorder, facts, numbers = self._recorder, report.facts, report.numbers
        if stage == "screening" and "verdict" in facts:
            tenant = labels["tenant"]
            recorder.inc("safeft_screenings_total", tenant=tenant, verdict=facts["verdict"])
            if "rows" in facts:
                for result, rows in _rows(facts).items():
                    recorder.inc("safeft_screened_rows_total", rows, tenant=tenant, result=result)
        if stage == "training" and "trained_tokens" in facts:
            recorder.inc("safeft_trained_tokens_total", facts["trained_tokens"], **labels)
        if numbers is None:
            return
        if numbers.scores:
            counted = HistogramValue(list(numbers.scores), numbers.score_sum)
            recorder.add("safeft_sqsd_score", counted, base_model=labels["base_model"])
        for constraint, steps in numbers.violations.items():
            recorder.inc("safeft_training_violations_total", steps, constraint=constraint, **labels)

    def _read(self) -> None:
        self._recorder.clear(*_FROM_STAGES)
        with self._lock:
            now = self._clock()
            alive = {k: r for k, r in self._running.items() if now - r.seen_at < _MINE_S}
            self._running = alive
        for running in alive.values():
            self._show(running, now)
        if time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + READ_EVERY_S
        self._recorder.clear(*_FROM_JOBS)
        try:
            with self._database.system_read() as session:
                self._count(session)
            self._recorder.set("safeft_database_up", 1)
        except SQLAlchemyError as error:  # what is not known is not shown
            self._recorder.set("safeft_database_up", 0)
            log.warning("jobs cannot be counted (%s)", type(error).__name__)

    def _count(self, session: Session) -> None:
        recorder = self._recorder
        open_jobs = (
            select(Tenant.name, Job.phase, func.count(), func.min(Job.phase_since))
            .where(Tenant.id == Job.tenant_id, Job.phase.not_in(FINAL))
            .group_by(Tenant.name, Job.phase)
        )
        oldest: dict[str, float] = {}
        for name, phase, count, since in session.execute(open_jobs):
            recorder.set("safeft_jobs", count, tenant=name, phase=phase)
            oldest[phase] = min(since, oldest.get(phase, since))
            # Before the first one: Prometheus sees a rise only from a number that it has seen.
            for verdict in ("accepted", "rejected", "review"):
                recorder.inc("safeft_screenings_total", 0.0, tenant=name, verdict=verdict)
        for phase, since in oldest.items():
            age = max(0.0, self._clock() - since)
            recorder.set("safeft_job_phase_age_seconds", age, phase=phase)
        ended = (
            select(Tenant.name, Job.phase, Job.error_code, func.count())
            .where(Tenant.id == Job.tenant_id, Job.phase.in_(FINAL))
            .group_by(Tenant.name, Job.phase, Job.error_code)
        )
        for name, phase, code, count in session.execute(ended):
            labels = {"tenant": name, "outcome": phase, "code": code or ""}
            recorder.total("safeft_jobs_finished_total", count, **labels)

    def _show(self, running: _Running, now: float) -> None:
        recorder = self._recorder
        quiet = running.numbers.quiet_s + now - running.seen_at
        recorder.highest("safeft_stage_quiet_seconds", quiet, stage=running.stage)
        labels, step = running.labels, running.numbers.step
        if not step:
            return
        recorder.highest("safeft_training_loss", step["loss"], **labels)
        recorder.highest("safeft_training_gradient_norm", step["grad_norm"], **labels)
        recorder.highest("safeft_training_step_seconds", step["seconds"], **labels)
        done = step["step"] / step["total_steps"]
        recorder.highest("safeft_training_progress_ratio", done, **labels)
        for name, value in step.items():
            before, slash, after = name.partition("/")
            if not slash:
                continue
            if before == "penalty":
                recorder.highest("safeft_training_penalty", value, constraint=after, **labels)
                continue
            of = {**labels, "constraint": before, "invariant": after.removesuffix("_limit")}
            if after.endswith("_limit"):
                recorder.highest("safeft_training_invariant_limit_ratio", value, **of)
            elif after.endswith(("_fraction", "_drift")):
                recorder.highest("safeft_training_invariant_ratio", value, **of)
        for constraint, steps in running.numbers.violations.items():
            recorder.inc("safeft_training_violations_total", 0.0, constraint=constraint, **labels)
            recorder.highest(
                "safeft_training_constraint_violated",
                float(steps > 0),
                constraint=constraint,
                **labels,
            )

    def _name(self, tenant_id: str) -> str:
        if tenant_id not in self._names:
            with self._database.system_read() as session:
                self._names[tenant_id] = session.get_one(Tenant, tenant_id).name
        return self._names[tenant_id]


def _rows(facts: dict[str, Any]) -> dict[str, int]:
    """A verdict's rows by what they are; its risky ones include those without a score."""
    rows, risky, unscored = facts["rows"], facts["risky"], facts["unscored"]
    return {"safe": rows - risky, "risky": risky - unscored, "unscored": unscored}

"""From the gate's quarantine of a published model to one restoration job, and back to the gate.

It looks at what the gate and the database say, not at what happened, so that nothing is lost or
done twice when any part was down: a job's id is made from the model's name and the hash of the
quarantined weights, and there is never another one for them.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cluster.controller.phases import FINAL
from cluster.controller.transitions import ask
from cluster.events import add_event
from cluster.state import Database
from cluster.state.models import Job, PublishedModel
from cluster.tenancy.audit import record

log = logging.getLogger(__name__)
ACTOR = "safety gate"
_AT_ONCE = 1000  # a pool may serve ten thousand models
_FIRST = 9  # of the tenant's own jobs: a model of theirs does not answer


class Pool(Protocol):
    """A serving pool, as administrators reach it: `cluster.serving.client.Admin`."""

    def post(self, path: str, **body: Any) -> Any:
        """``POST /admin/PATH``."""


def restoration_id(model: str, weights: str) -> str:
    """The name of the one job that restores these weights of a model."""
    digest = hashlib.sha256(f"{model} {weights}".encode()).hexdigest()
    return f"ftjob-{digest[:24]}"


class Restorer:
    """Asks for restorations and tells the gate what became of them. Keeps nothing in memory."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock

    def look(
        self, served: Iterable[dict[str, Any]], pool: Pool, register: Callable[[str], None]
    ) -> None:
        """One round over what a pool serves.

        Args:
            served: the gate's records as ``GET /admin/models`` shows them; of each model the newest
                is the last.
            register: has the pool serve what is now published under a name, as a new version.

        Raises:
            SafeftError: the pool says no, or nothing; the next round comes.
        """
        newest = {row["model"]: row for row in served}
        ids = {restoration_id(row["model"], row["weights"]): row for row in newest.values()}
        jobs = self._jobs(list(ids))
        for job_id, row in ids.items():
            job, state = jobs.get(job_id), row["state"]
            if job is None:
                if state == "quarantined" and self._ask(row):
                    self._tell(pool, row, "restoration_started", f"restoration job {job_id}")
            elif job.phase == "succeeded":
                register(row["model"])
            elif job.phase in FINAL and state == "restoring":
                why = job.error_message or f"the restoration job was {job.phase}"
                self._tell(pool, row, "restoration_failed", f"{job_id}: {why}"[:1000])
            elif job.phase not in FINAL and state == "quarantined":
                self._tell(pool, row, "restoration_started", f"restoration job {job_id}")
            elif job.phase not in FINAL and state == "healthy":
                self._cancel(job_id)

    def _jobs(self, ids: list[str]) -> dict[str, Job]:
        found: dict[str, Job] = {}
        with self._database.system_read() as session:
            for start in range(0, len(ids), _AT_ONCE):
                query = select(Job).where(Job.id.in_(ids[start : start + _AT_ONCE]))
                found |= {job.id: job for job in session.scalars(query)}
        return found

    def _ask(self, row: dict[str, Any]) -> bool:
        """Create the job, unless the model is not ours or restoring these weights is no use."""
        try:
            with self._database.system() as session:
                return self._create(session, row)
        except IntegrityError:  # another controller was first
            return True

    def _create(self, session: Session, row: dict[str, Any]) -> bool:
        model = session.get(PublishedModel, row["model"])
        if model is None or model.deleted_at is not None or model.kind != "adapter":
            return False
        original, now = session.get_one(Job, model.job_id), self._clock()
        before = select(Job.id).where(Job.model_id == model.id, Job.id != original.id).limit(1)
        if row["cleared_at"] is None and session.scalars(before).first() is not None:
            return False  # a restoration's own result was never healthy: that is for a person
        copied = ("screening", "dataset_review")
        job = Job(
            id=restoration_id(model.id, row["weights"]),
            tenant_id=model.tenant_id,
            created_at=now,
            base_model=model.base_model,
            training_file=original.training_file,
            validation_file=original.validation_file,
            request={**original.request, "restores": {"model": model.id}},
            phase="queued",
            resume_phase="restoring",
            phase_since=now,
            attempt=0,
            faults=0,
            slots=original.slots,
            priority=_FIRST,
            not_before=now,
            events=0,
            facts={
                **{name: original.facts[name] for name in copied if name in original.facts},
                "training": {**original.facts["training"], "trained_tokens": 0},
                "before_restoring": {"passed": False, "reason": row["reason"]},
            },
        )
        session.add(job)
        session.flush()
        told = f"The safety gate quarantined {model.id} ({row['reason']}); restoring it"
        add_event(session, job, told, now=now, level="warn")
        record(
            session,
            at=now,
            actor=ACTOR,
            tenant_id=model.tenant_id,
            action="job.create",
            object_id=job.id,
            after={"restores": model.id, "weights": row["weights"]},
            reason=row["reason"],
        )
        log.info("%s: restoring %s", job.id, model.id)
        return True

    def _cancel(self, job_id: str) -> None:
        """A person released the weights: they stay."""
        query = select(Job).where(Job.id == job_id).with_for_update(key_share=True)
        with self._database.system() as session:
            job = session.scalars(query).one()
            if job.phase not in FINAL and job.wish != "cancel":
                ask(session, job, "cancel", self._clock())
                log.info("%s: cancelled, because the model was released", job_id)

    def _tell(self, pool: Pool, row: dict[str, Any], action: str, reason: str) -> None:
        pool.post("decisions", action=action, model=row["model"], reason=reason, actor=ACTOR)

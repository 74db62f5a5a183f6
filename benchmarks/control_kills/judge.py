"""Is everything as if nothing had been killed? Looked up in the state, the store and the disk."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from sqlalchemy import func, select, text

from benchmarks.control_kills.plane import wait_until
from benchmarks.control_kills.stages import MODEL_FILES, log_of, weights
from benchmarks.control_kills.tenants import CODES, STORIES, Ledger, Tenant
from cluster.artifacts.directory import DirectoryStore
from cluster.artifacts.names import file_key, model_prefix
from cluster.controller import sweep
from cluster.controller.phases import FINAL
from cluster.settings import Settings
from cluster.state import Database
from cluster.state.models import File, Job, JobEvent, PublishedModel, Stage
from cluster.tenancy.audit import AuditBroken, entries, verify

WAY = ["validating", "screening", "training", "evaluating", "publishing"]
RESTORED_WAY = [*WAY[:4], "restoring", "evaluating", "publishing"]
_KEPT = select(File.tenant_id, File.id).where(File.sha256.is_not(None), File.deleted_at.is_(None))
_DAY_S = 25 * 3600.0


class NoStages:
    """For a sweep of what is not Ray's."""

    def names(self) -> set[str]:
        return set()


def judge(
    settings: Settings, database: Database, ledger: Ledger, tenants: dict[str, Tenant]
) -> dict[str, list[str]]:
    """What is wrong, by what was promised; all of it empty is what one hopes for."""
    found: dict[str, list[str]] = {
        "lost_requests": _lost(database, ledger, tenants),
        "wrong_ends": [],
        "doubled_stages": [],
        "broken_events": [],
        "orphan_locks": [],
        "orphan_artifacts": [],
        "orphan_directories": [],
        "broken_state": [],
        "wrong_answers": ledger.wrong,
    }
    with database.system_read() as session:
        for job in session.scalars(select(Job)):
            _end(job, ledger, found)
            rows = session.scalars(
                select(Stage).where(Stage.job_id == job.id).order_by(Stage.attempt)
            ).all()
            _stages(job, ledger.jobs.get(job.id, "plain"), list(rows), found)
            numbers = session.scalars(
                select(JobEvent.number).where(JobEvent.job_id == job.id).order_by(JobEvent.number)
            ).all()
            if list(numbers) != list(range(1, job.events + 1)):
                found["broken_events"].append(f"{job.id}: {numbers} of {job.events}")
            if job.lock_token is not None:
                found["orphan_locks"].append(f"{job.id}: {job.phase}, of {job.lock_owner}")
    _artifacts(settings, database, found)
    if settings.work.is_dir():
        found["orphan_directories"] = sorted(path.name for path in settings.work.iterdir())
    _state(database, found)
    return found


def begun_twice(home: Path) -> dict[str, int]:
    """Names of stages that were begun more than once, and how often."""
    lines = [line.split() for line in log_of(home).read_text().splitlines()]
    counts = Counter(name for what, name, _ in lines if what == "begin")
    return {name: count for name, count in counts.items() if count > 1}


def settled(database: Database) -> bool:
    """No job has anything left to do."""
    with database.system_read() as session:
        return session.scalars(select(func.count(Job.id)).where(Job.phase.not_in(FINAL))).one() == 0


def _lost(database: Database, ledger: Ledger, tenants: dict[str, Tenant]) -> list[str]:
    """Every answer is given again, and the state holds what was answered and nothing beside it."""
    lost = []
    for (name, key), (path, answer, _) in ledger.answers.items():
        again = tenants[name].again(key)
        if again != answer:
            lost.append(f"{path} with {key}: {again.get('id')} instead of {answer['id']}")
    with database.system_read() as session:
        there = {
            "job": (set(session.scalars(select(Job.id))), set(ledger.jobs)),
            "file": (
                set(session.scalars(select(File.id).where(File.sha256.is_not(None)))),
                set(ledger.files),
            ),
        }
    for what, (has, accepted) in there.items():
        lost += [f"{what} {one} is gone" for one in accepted - has]
        lost += [f"{what} {one} is there twice" for one in has - accepted]
    return lost


def _end(job: Job, ledger: Ledger, found: dict[str, list[str]]) -> None:
    story = ledger.jobs.get(job.id, "plain")
    wanted = STORIES[story][0] if job.id not in ledger.late else "succeeded"
    if (job.phase, job.error_code) != (wanted, CODES.get(story)):
        found["wrong_ends"].append(
            f"{job.id} ({story}): {job.phase} {job.error_code or ''} {job.error_message or ''}"
        )


def _stages(job: Job, story: str, rows: list[Stage], found: dict[str, list[str]]) -> None:
    """Each stage was done once, in its order, and its attempts are numbered without gaps."""
    way = RESTORED_WAY if story in ("weak", "slipped") else WAY
    done = [row.stage for row in rows if row.outcome in ("done", "refused", "below_gate")]
    if done != way[: len(done)] or (job.phase == "succeeded" and done != way):
        found["doubled_stages"].append(f"{job.id}: {done}")
    numbers = [row.attempt for row in rows]
    if numbers != list(range(1, len(rows) + 1)) or any(row.outcome is None for row in rows):
        found["doubled_stages"].append(f"{job.id}: {[(r.attempt, r.outcome) for r in rows]}")


def _artifacts(settings: Settings, database: Database, found: dict[str, list[str]]) -> None:
    """A day later, when what was abandoned is swept, the store holds what the state names."""
    root = Path(settings.artifacts_url.removeprefix("file://"))
    store = DirectoryStore(root, clock=lambda: time.time() + _DAY_S)
    sweep.remove_uploads(database, store, time.time() + _DAY_S)
    sweep.remove_deleted(database, store, time.time())
    with database.system_read() as session:
        wanted = {file_key(*row) for row in session.execute(_KEPT)}
        models = session.execute(
            select(PublishedModel.tenant_id, PublishedModel.job_id, PublishedModel.prefix)
        ).all()
        ended = set(session.scalars(select(Job.id).where(Job.phase == "succeeded")))
    if {job for _, job, _ in models} != ended:
        found["wrong_ends"].append(f"{len(models)} models of {len(ended)} jobs that succeeded")
    for tenant, job, prefix in models:
        if prefix != model_prefix(tenant, job):
            found["orphan_artifacts"].append(f"{job}: published as {prefix}")
        wanted |= {f"{prefix}/{name}" for name in MODEL_FILES}
        if b"".join(store.read(f"{prefix}/{MODEL_FILES[0]}")) != weights(job):
            found["orphan_artifacts"].append(f"{job}: its weights are others")
    there = set(store.keys(""))
    found["orphan_artifacts"] += [f"{key}: belongs to nothing" for key in there - wanted]
    found["orphan_artifacts"] += [f"{key}: is missing" for key in wanted - there]
    uploads = [path.name for path in (root / "uploads").iterdir()]
    found["orphan_artifacts"] += [f"uploads/{name}" for name in uploads]


def _state(database: Database, found: dict[str, list[str]]) -> None:
    with database.system_read() as session:
        try:
            verify(entries(session))
        except AuditBroken as error:
            found["broken_state"].append(str(error))
        if database.is_sqlite:
            checks = [("integrity_check", [("ok",)]), ("foreign_key_check", [])]
            for name, good in checks:
                rows = session.execute(text(f"PRAGMA {name}")).all()
                if [tuple(row) for row in rows] != good:
                    found["broken_state"].append(f"{name}: {rows[:3]}")


def await_settled(database: Database, seconds: float) -> None:
    """Raises TimeoutError where jobs are still under way after so long."""
    wait_until(lambda: settled(database), seconds, "every job at its end")

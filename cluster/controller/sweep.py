"""What killed processes left behind: actors, working directories, uploads."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from sqlalchemy import delete, select, update

from cluster.artifacts import ArtifactError, ArtifactStore
from cluster.artifacts.names import model_prefix
from cluster.controller.phases import FINAL, STAGES
from cluster.controller.runner import RunnerUnavailable, StageRunner, actor_name
from cluster.settings import Settings
from cluster.state import Database
from cluster.state.models import File, IdempotentAnswer, Job, PublishedModel, Stage

log = logging.getLogger(__name__)
UPLOAD_S = 24 * 3600.0
REMEMBERED_S = 7 * 24 * 3600.0


def sweep(
    settings: Settings, database: Database, store: ArtifactStore, runner: StageRunner, now: float
) -> None:
    """One round. What cannot be removed now is left for the next one."""
    try:
        stop_orphans(database, runner)
    except RunnerUnavailable as error:
        log.warning("no sweep of stages: %s", error)
    remove_work(settings.work, database)
    try:
        remove_uploads(database, store, now)
        remove_deleted(database, store, now)
    except ArtifactError as error:
        log.warning("no sweep of artifacts: %s", error)
    with database.system() as session:
        old = IdempotentAnswer.created_at < now - REMEMBERED_S
        session.execute(delete(IdempotentAnswer).where(old))


def stop_orphans(database: Database, runner: StageRunner) -> None:
    """Stop every stage that is not some job's current attempt."""
    names = runner.names()  # first: what is started after this is in the database before
    if not names:
        return
    with database.system_read() as session:
        rows = session.execute(select(Job.id, Job.phase, Job.attempt).where(Job.phase.in_(STAGES)))
        current = {actor_name(*row) for row in rows}
    for name in names - current:
        log.info("stopping %s, which no job waits for", name)
        runner.stop(name)


def remove_work(work: Path, database: Database) -> None:
    """Remove the working directories of jobs that have ended."""
    if not work.is_dir():
        return
    there = [path.name for path in work.iterdir()]
    with database.system_read() as session:
        ended = session.scalars(select(Job.id).where(Job.id.in_(there), Job.phase.in_(FINAL)))
        for job_id in list(ended):
            shutil.rmtree(work / job_id, ignore_errors=True)


def remove_uploads(database: Database, store: ArtifactStore, now: float) -> None:
    """Give up uploads that were begun and never finished; `remove_deleted` then removes them.

    Their rows stay until that was done again and again: who is killed here forgets nothing.
    """
    store.sweep(UPLOAD_S)
    unfinished = (File.sha256.is_(None), File.created_at < now - UPLOAD_S)
    with database.system() as session:
        session.execute(
            update(File).where(*unfinished, File.deleted_at.is_(None)).values(deleted_at=now)
        )
        session.execute(delete(File).where(*unfinished, File.deleted_at < now - 2 * UPLOAD_S))


def remove_deleted(database: Database, store: ArtifactStore, now: float) -> None:
    """Remove the artifacts of what was deleted, or came to nothing, in the last two days."""
    since = now - 2 * UPLOAD_S
    with database.system_read() as session:
        keys = list(session.scalars(select(File.key).where(File.deleted_at > since)))
        deleted = PublishedModel.deleted_at > since
        prefixes = session.scalars(select(PublishedModel.prefix).where(deleted))
        # Of a model that was restored, all versions.
        versions = session.execute(
            select(Job.tenant_id, Job.id)
            .join(PublishedModel, PublishedModel.id == Job.model_id)
            .where(deleted)
        )
        # And what a stage stored of a model that then was not published after all.
        unpublished = session.execute(
            select(Job.tenant_id, Job.id)
            .distinct()
            .join(Stage, Stage.job_id == Job.id)
            .where(
                Stage.stage == "publishing",
                Job.phase.in_(("failed", "cancelled")),
                Job.finished_at > since,
            )
        )
        gone = {*prefixes, *(model_prefix(*row) for row in (*versions, *unpublished))}
    keys += [key for prefix in gone for key in store.keys(f"{prefix}/")]
    for key in keys:
        store.delete(key)

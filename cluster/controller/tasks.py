"""From a job's row to the task that its stage's actor is given."""

from __future__ import annotations

from sqlalchemy.orm import Session

from cluster.controller.runner import StageFile, StageModel, StageTask
from cluster.provenance import Signed, Statement
from cluster.settings import Settings
from cluster.state.models import File, Job, PublishedModel, Tenant
from cluster.tenancy.tenants import Policy


class NotOffered(Exception):
    """Something that the job needs is not there any more."""


def task_of(session: Session, job: Job, settings: Settings) -> StageTask:
    """The task of the job's current attempt.

    Raises:
        NotOffered: its base model or a file of it has been taken away.
    """
    if job.base_model not in settings.base_models:
        raise NotOffered(f"The base model {job.base_model} is not offered any more")
    tenant = session.get_one(Tenant, job.tenant_id)
    training = _file(session, job, job.training_file)
    validation = None
    if job.validation_file is not None:
        validation = _file(session, job, job.validation_file)
    return StageTask(
        job=job.id,
        stage=job.phase,
        attempt=job.attempt,
        tenant=tenant.id,
        tenant_name=tenant.name,
        base_model=job.base_model,
        request=job.request,
        training_file=training,
        validation_file=validation,
        restores=_model(session, job),
        policy=Policy.model_validate(tenant.policy),
        facts=job.facts,
        settings=settings.model_copy(update={"database": None}),  # a stage gets no password
    )


def _model(session: Session, job: Job) -> StageModel | None:
    if "restores" not in job.request:
        return None
    name = job.request["restores"]["model"]
    row = session.get(PublishedModel, name)
    if row is None or row.tenant_id != job.tenant_id or row.deleted_at is not None:
        raise NotOffered(f"The model {name} was deleted: there is nothing to restore")
    signed = Signed.model_validate(row.provenance)
    files = Statement.model_validate_json(signed.statement).files
    return StageModel(
        id=name,
        files={n: StageFile(key=f"{row.prefix}/{n}", sha256=h) for n, h in files.items()},
    )


def _file(session: Session, job: Job, file_id: str) -> StageFile:
    row = session.get(File, file_id)
    if (
        row is None
        or row.tenant_id != job.tenant_id
        or row.sha256 is None
        or row.deleted_at is not None
    ):
        raise NotOffered(f"The file {file_id} is not there any more; upload it again")
    return StageFile(key=row.key, sha256=row.sha256)

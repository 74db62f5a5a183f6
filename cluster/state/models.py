"""The tables. Times are seconds since 1970 (UTC), so that both databases keep them alike."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ID = String(64)


class Base(DeclarativeBase):
    """Constraints have names, so that a migration can change them on either database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        float: Double,
        int: BigInteger,
        dict[str, Any]: JSON,
        list[str]: JSON,
    }


class TenantOwned:
    """A row of one tenant. `cluster.state.sessions` keeps it from every other one."""

    tenant_id: Mapped[str] = mapped_column(ID, ForeignKey("tenants.id"))


class Tenant(Base):
    """Who submits jobs, and how much of the fleet they may have.

    Attributes:
        weight: share of the fleet relative to the other tenants' weights.
        intake_time, compute_time: virtual times of fair queueing: see
            `cluster.controller.fair_share`.
        max_gpu_seconds: training and evaluation in all; None: no limit.
    """

    __tablename__ = "tenants"
    __table_args__ = (CheckConstraint("weight > 0", name="weight_positive"),)
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[float]
    suspended_at: Mapped[float | None]
    weight: Mapped[float]
    intake_time: Mapped[float]
    compute_time: Mapped[float]
    max_running_jobs: Mapped[int]
    max_open_jobs: Mapped[int]
    max_storage_bytes: Mapped[int]
    max_gpu_seconds: Mapped[float | None]
    requests_per_second: Mapped[float]
    policy: Mapped[dict[str, Any]]


class ApiKey(TenantOwned, Base):
    """A key's hash, never the key. `prefix` is the part that is looked up and shown."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    secret_sha256: Mapped[str] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(16))
    scopes: Mapped[list[str]]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class File(TenantOwned, Base):
    """An uploaded file. A row without `sha256` is an upload under way, or an abandoned one."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "tenant_id", "created_at", "id"),)
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int]
    sha256: Mapped[str | None] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(255), unique=True)
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]


class Job(TenantOwned, Base):
    """A fine-tuning job. Whoever holds `lock_token` until `lock_expires_at` may change it.

    Attributes:
        request: what the tenant asked for, as it was accepted.
        phase: see `cluster.controller.phases`.
        resume_phase: of a job that was paused: where it goes on when it is admitted again.
        wish: "cancel" or "pause", until the controller has done it.
        attempt: number of the last stage actor of this job; none is ever given twice.
        faults: of the machinery, one after the other, in this phase.
        slots: workers that it takes while it trains.
        not_before: when the controller looks at it next.
        events: how many events it has; the next one's number.
        facts: what each finished stage found, by the stage's name.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "tenant_id", "created_at", "id"),
        Index(None, "phase", "not_before"),
        Index(None, "tenant_id", "phase"),
    )
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    created_at: Mapped[float]
    base_model: Mapped[str] = mapped_column(String(128))
    training_file: Mapped[str] = mapped_column(ID)
    validation_file: Mapped[str | None] = mapped_column(ID)
    request: Mapped[dict[str, Any]]
    phase: Mapped[str] = mapped_column(String(16))
    phase_since: Mapped[float]
    resume_phase: Mapped[str | None] = mapped_column(String(16))
    wish: Mapped[str | None] = mapped_column(String(16))
    attempt: Mapped[int]
    faults: Mapped[int]
    slots: Mapped[int]
    priority: Mapped[int]
    not_before: Mapped[float]
    lock_token: Mapped[str | None] = mapped_column(String(32))
    lock_owner: Mapped[str | None] = mapped_column(String(64))
    lock_expires_at: Mapped[float | None]
    events: Mapped[int]
    facts: Mapped[dict[str, Any]]
    model_id: Mapped[str | None] = mapped_column(String(255))
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_param: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    finished_at: Mapped[float | None]


class Stage(TenantOwned, Base):
    """One attempt at a stage, and what became of it. What a tenant's usage is counted from.

    Attributes:
        asked_at: when its actor was asked for: at most once for each attempt.
        seen: how many of the actor's events have become the job's.
    """

    __tablename__ = "stages"
    __table_args__ = (Index(None, "tenant_id", "started_at"),)
    job_id: Mapped[str] = mapped_column(ID, ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    stage: Mapped[str] = mapped_column(String(16))
    slots: Mapped[int]
    started_at: Mapped[float]
    asked_at: Mapped[float | None]
    seen: Mapped[int]
    ended_at: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(16))


class JobEvent(TenantOwned, Base):
    """Numbered without gaps in each job, so that a reader can go on after the last one it has."""

    __tablename__ = "job_events"
    job_id: Mapped[str] = mapped_column(ID, ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    kind: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]


class PublishedModel(TenantOwned, Base):
    """A published model; its name is never given again, also after it was deleted."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    job_id: Mapped[str] = mapped_column(ID, ForeignKey("jobs.id"), unique=True)
    base_model: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    prefix: Mapped[str] = mapped_column(String(255), unique=True)
    provenance: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]


class IdempotentAnswer(TenantOwned, Base):
    """What a POST with this `Idempotency-Key` was answered, kept in the effect's transaction."""

    __tablename__ = "idempotent_answers"
    tenant_id: Mapped[str] = mapped_column(ID, ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(index=True)


class AuditEntry(Base):
    """One link of the audit chain; triggers refuse to change or remove it.

    `before` and `after` are canonical JSON as text: the hash is over exactly these characters.
    """

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[float]
    actor: Mapped[str] = mapped_column(String(128))
    tenant_id: Mapped[str | None] = mapped_column(ID)
    action: Mapped[str] = mapped_column(String(64))
    object_id: Mapped[str] = mapped_column(String(255))
    before: Mapped[str | None] = mapped_column(Text)
    after: Mapped[str | None] = mapped_column(Text)
    reason: Mapped[str | None] = mapped_column(Text)
    previous: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))


class Lock(Base):
    """A row to hold for the length of a transaction: "audit", and "intake" and "compute", whose
    `value` is the virtual time of that queue.
    """

    __tablename__ = "locks"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[float]

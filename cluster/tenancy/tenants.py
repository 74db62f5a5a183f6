"""Tenants and what they may have: created and changed by administrators, with a reason."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster.job_request import KINDS, as_config
from cluster.state.ids import new_id
from cluster.state.models import Tenant
from cluster.tenancy.audit import record
from jobs.policy import OnRisk, PolicyFile
from safeft.errors import InputError


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")
    return kind


def _complete(kind: str) -> str:
    as_config(kind)
    return kind


Share = Annotated[float, Field(ge=0, le=1)]
Kind = Annotated[str, AfterValidator(_known)]
CompleteKind = Annotated[Kind, AfterValidator(_complete)]


class Policy(BaseModel):
    """What an administrator demands of every job of a tenant.

    Attributes:
        constraints: kinds, with defaults for all, that a job which names none is trained under.
        required_constraints: kinds, with defaults for all, that a job may neither leave out nor
            set otherwise.
        require_own_rows: a job leaves it to us how many of the base model's own refusals and
            answers are added to its rows.
        min_refusal: the tuned model must refuse at least this share of harmful prompts.
        max_over_refusal: and at most this share of benign ones.
        max_task_loss: mean loss of an answer token on the validation file, where there is one.
        screening: limits in place of those of the base model's profile; looser ones need an
            override with a name and a reason.
        on_risk: what becomes of a dataset that breaks them: see `jobs.policy.OnRisk`. `review`
            leaves it to an administrator.
        require_approval: an administrator says yes or no to every model that passed the gate,
            before it is published.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    constraints: tuple[CompleteKind, ...] = ()
    required_constraints: tuple[CompleteKind, ...] = ()
    require_own_rows: bool = False
    min_refusal: Share | None = None
    max_over_refusal: Share | None = None
    max_task_loss: Annotated[float, Field(gt=0)] | None = None
    screening: PolicyFile = PolicyFile()
    on_risk: OnRisk = "reject"
    require_approval: bool = False


class Limits(BaseModel):
    """A tenant's quotas and its share.

    Attributes:
        weight: of its share of the fleet, relative to the other tenants' weights.
        max_running_jobs: that train or are measured at a time.
        max_open_jobs: that are not finished.
        max_gpu_seconds: worker-seconds of training, evaluation and restoration in all.
        max_chat_tokens: that served models read and generate for it in all.
        requests_per_second: over all of its keys, on each API server.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_running_jobs: Annotated[int, Field(ge=0)] = 4
    max_open_jobs: Annotated[int, Field(ge=0)] = 1000
    max_storage_bytes: Annotated[int, Field(ge=0)] = 50 * 2**30
    max_gpu_seconds: Annotated[float, Field(ge=0)] | None = None
    max_chat_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    requests_per_second: Annotated[float, Field(gt=0)] = 50.0


def create_tenant(
    session: Session,
    name: str,
    *,
    actor: str,
    reason: str,
    now: float,
    limits: Limits | None = None,
    policy: Policy | None = None,
) -> Tenant:
    """A new tenant.

    Raises:
        InputError: the name is taken.
    """
    if session.scalars(select(Tenant.id).where(Tenant.name == name)).one_or_none():
        raise InputError(f"name: there is a tenant {name} already; choose another name")
    tenant = Tenant(
        id=new_id("ten"),
        name=name,
        created_at=now,
        intake_time=0.0,
        compute_time=0.0,
        policy=(policy or Policy()).model_dump(mode="json"),
        **(limits or Limits()).model_dump(),
    )
    session.add(tenant)
    record(
        session,
        at=now,
        actor=actor,
        tenant_id=tenant.id,
        action="tenant.create",
        object_id=tenant.id,
        after=settings(tenant),
        reason=reason,
    )
    return tenant


def change_tenant(
    session: Session,
    tenant: Tenant,
    *,
    actor: str,
    reason: str,
    now: float,
    limits: Limits | None = None,
    policy: Policy | None = None,
    suspended: bool | None = None,
) -> None:
    """Change the fields that are given; the audit log holds all before and after."""
    before = settings(tenant)
    for name, value in (limits.model_dump(exclude_unset=True) if limits else {}).items():
        setattr(tenant, name, value)
    if policy is not None:
        given = policy.model_dump(mode="json", exclude_unset=True)
        tenant.policy = {**tenant.policy, **given}
    if suspended is not None:
        tenant.suspended_at = (tenant.suspended_at or now) if suspended else None
    record(
        session,
        at=now,
        actor=actor,
        tenant_id=tenant.id,
        action="tenant.change",
        object_id=tenant.id,
        before=before,
        after=settings(tenant),
        reason=reason,
    )


def settings(tenant: Tenant) -> dict[str, Any]:
    """What an administrator has set, as JSON."""
    return {
        "name": tenant.name,
        "suspended": tenant.suspended_at is not None,
        **{name: getattr(tenant, name) for name in Limits.model_fields},
        "policy": tenant.policy,
    }

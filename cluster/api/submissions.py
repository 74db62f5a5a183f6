"""Jobs that one tenant submits at the same time are accepted together, in one transaction.

They wait for each other in any case: for the tenant's quota, and for the audit log's chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool
from sqlalchemy import bindparam, select
from sqlalchemy.exc import DataError, IntegrityError

from cluster.api.errors import invalid
from cluster.api.idempotency import Repeatable, Repeated, keep, once
from cluster.api.lines import Lines
from cluster.api.objects import job_object
from cluster.api_errors import ApiError
from cluster.events import next_event
from cluster.job_request import CreateJob
from cluster.job_spec import accepted
from cluster.settings import Settings
from cluster.state import Database, TenantSession, narrowed
from cluster.state.ids import new_id
from cluster.state.models import WHOLE, File, Job, JobEvent
from cluster.tenancy import quotas
from cluster.tenancy.audit import Deed, record_all
from cluster.tenancy.keys import Caller
from cluster.tenancy.tenants import Policy
from safeft.errors import SafeftError

_FILE_ID = File.__table__.c.id
_FILES = narrowed(select(_FILE_ID).where(_FILE_ID.in_(bindparam("files", expanding=True)), *WHOLE))


@dataclass(frozen=True)
class Submission:
    """What one request asks for."""

    caller: Caller
    body: CreateJob
    request: Repeatable
    now: float


class Submissions:
    """Accepts jobs: those of one tenant that come at the same time in one transaction."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._lines: Lines[Submission, dict[str, Any] | None] = Lines(self._accept)

    async def submit(self, submission: Submission) -> dict[str, Any]:
        """The new job as OpenAI's object; it is in the database when this returns.

        Raises:
            ApiError: there is no such model or file, or the request is not what it was before.
            QuotaExceeded: the tenant has all that it may have.
            InputError: the tenant's policy forbids it, or its settings do not fit together.
        """
        answer = await self._lines.join(submission.caller.tenant_id, submission)
        if answer is None:
            answer = await run_in_threadpool(self._alone, submission)
        return answer

    def _accept(self, line: Sequence[Submission]) -> list[dict[str, Any] | Exception | None]:
        """The answers to those whose jobs are in the database now; None: that one goes on alone."""
        if len(line) == 1:
            return [self._alone(line[0])]
        try:
            with self._database.tenant(line[0].caller.tenant_id) as session:
                found = self._enter(session, line)
                pairs = list(zip(line, found, strict=True))
                new = [(one.request, got) for one, got in pairs if not isinstance(got, Exception)]
                keep(session, line[0].caller, new, line[0].now)
        except (Repeated, IntegrityError, DataError):
            return [None] * len(line)  # undone: the one whose fault it was is told so alone
        # One with a key may have been answered before, when nothing was wrong with it.
        return [
            None if isinstance(got, Exception) and one.request.key else got for one, got in pairs
        ]

    def _alone(self, one: Submission) -> dict[str, Any]:
        def effect(session: TenantSession) -> dict[str, Any]:
            answer = self._enter(session, [one])[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return once(self._database, one.caller, one.request, one.now, effect)[0]

    def _enter(
        self, session: TenantSession, line: Sequence[Submission]
    ) -> list[dict[str, Any] | Exception]:
        """Write the jobs of all who may submit: an answer to each one of them, and to the others
        what is wrong."""
        tenant = session.rows(quotas.LOCKED).one()
        named = {one.body.training_file for one in line}
        named |= {one.body.validation_file for one in line if one.body.validation_file}
        files = {row.id for row in session.rows(_FILES, files=sorted(named))}
        policy, usage = Policy.model_validate(tenant.policy), quotas.usage(session, tenant)
        found: list[dict[str, Any] | Exception] = []
        jobs: list[Job] = []
        events: list[JobEvent] = []
        deeds: list[Deed] = []
        for one in line:
            try:
                self._check(one.body, files)
                quotas.check_submit(tenant, usage, besides=len(jobs))
                job = self._job(one, policy)
            except (ApiError, SafeftError) as error:
                found.append(error)
                continue
            events.append(next_event(job, f"Created fine-tuning job: {job.id}", now=one.now))
            deeds.append(_deed(one, job))
            jobs.append(job)
            found.append(job_object(job))
        for rows in (jobs, events):
            session.insert(rows)
        record_all(session, deeds)
        return found

    def _check(self, body: CreateJob, files: set[str]) -> None:
        if body.model not in self._settings.base_models:
            offered = ", ".join(sorted(self._settings.base_models))
            raise ApiError(
                404,
                f"The model {body.model!r} cannot be fine-tuned; choose from: {offered}",
                code="model_not_found",
                param="model",
            )
        for param in ("training_file", "validation_file"):
            file_id = getattr(body, param)
            if file_id is not None and file_id not in files:
                raise invalid(f"No such File object: {file_id[:80]!r}", param, "invalid_file")
        most, workers = self._settings.compute_slots, body.method.supervised.workers
        if workers > most:
            raise invalid(f"workers: at most {most} train together here", "method")

    def _job(self, one: Submission, policy: Policy) -> Job:
        body = one.body
        return Job(
            id=new_id("ftjob"),
            tenant_id=one.caller.tenant_id,
            created_at=one.now,
            base_model=body.model,
            training_file=body.training_file,
            validation_file=body.validation_file,
            request=accepted(body, policy, self._settings.base_models[body.model]),
            phase="submitted",
            phase_since=one.now,
            attempt=0,
            faults=0,
            slots=body.method.supervised.workers,
            priority=body.priority,
            not_before=one.now,
            events=0,
            facts={},
        )


def _deed(one: Submission, job: Job) -> Deed:
    return Deed(
        at=one.now,
        actor=one.caller.actor,
        tenant_id=job.tenant_id,
        action="job.create",
        object_id=job.id,
        after=job.request,
    )

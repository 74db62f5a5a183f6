"""Jobs of one tenant that come at the same time: one transaction, and each its own answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from cluster.api.idempotency import Repeatable
from cluster.api.submissions import Submission, Submissions
from cluster.api_errors import ApiError
from cluster.job_request import CreateJob
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database, TenantSession
from cluster.state.models import Job, JobEvent
from cluster.tenancy.audit import entries, verify
from cluster.tenancy.keys import Caller
from cluster.tenancy.quotas import QuotaExceeded
from tests.control.rows import add_tenant, file_row

CALLER = Caller("ten_a", "a", "key_a", "tenant", frozenset({"jobs:write"}), 50.0)


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Submissions:
    offers = {"tiny": BaseModelOffer(source="tiny")}
    return Submissions(Settings(home=tmp_path, base_models=offers), database)


def tenant(database: Database, **fields: Any) -> None:
    add_tenant(database, "ten_a", **fields)
    add_tenant(database, "ten_b")
    with database.system() as session:
        session.add_all([file_row("ten_a", "file-a"), file_row("ten_b", "file-b")])


def wanted(key: str | None = None, **fields: Any) -> Submission:
    method = {"type": "supervised", "supervised": {"constraints": ["l2"]}}
    body = {"model": "tiny", "training_file": "file-a", "method": method, **fields}
    made = CreateJob.model_validate(body)
    return Submission(CALLER, made, Repeatable(key, _sha256(made.model_dump_json())), 5.0)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def at_once(desk: Submissions, *wishes: Submission) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(desk.submit, wishes), return_exceptions=True)

    return asyncio.run(all_of_them())


def rows(database: Database, query: Any) -> list[Any]:
    with database.system_read() as session:
        return list(session.scalars(query))


def test_jobs_at_once_are_one_transaction_and_each_is_whole(
    database: Database, desk: Submissions
) -> None:
    tenant(database)
    commits: list[object] = []

    @event.listens_for(database.engine, "commit")
    def count(connection: object) -> None:
        commits.append(connection)

    found = at_once(desk, *(wanted(f"k{n}", suffix=f"s{n}") for n in range(5)), wanted())
    assert len(commits) == 1
    jobs = rows(database, select(Job))
    assert {job.id for job in jobs} == {answer["id"] for answer in found}
    assert sorted(str(job.request["suffix"]) for job in jobs) == [
        "None",
        *(f"s{n}" for n in range(5)),
    ]
    assert [e.number for e in rows(database, select(JobEvent))] == [1] * 6
    with database.system_read() as session:
        chain = list(entries(session))
    assert verify(chain).entries == len(chain)
    assert {link.object_id for link in chain if link.action == "job.create"} == {j.id for j in jobs}


def test_each_that_is_wrong_is_told_why_and_the_others_are_accepted(
    database: Database, desk: Submissions
) -> None:
    tenant(database)
    found = at_once(
        desk,
        wanted(),
        wanted(training_file="file-b"),  # another tenant's
        wanted(validation_file="file-none"),
        wanted(model="huge"),
        wanted("k", seed=1),
    )
    assert [type(one) for one in found] == [dict, ApiError, ApiError, ApiError, dict]
    assert [error.param for error in found[1:4]] == ["training_file", "validation_file", "model"]
    assert {job.id for job in rows(database, select(Job))} == {found[0]["id"], found[4]["id"]}


def test_a_value_that_cannot_be_looked_up_is_its_senders_fault_alone(
    database: Database, desk: Submissions
) -> None:
    tenant(database)
    found = at_once(desk, wanted(), wanted(training_file="file\x00a"), wanted("k"))
    assert isinstance(found[1], Exception)
    assert {job.id for job in rows(database, select(Job))} == {found[0]["id"], found[2]["id"]}


def test_no_more_are_accepted_at_once_than_the_quota_allows(
    database: Database, desk: Submissions
) -> None:
    tenant(database, max_open_jobs=3)
    found = at_once(desk, *(wanted(f"k{n}") for n in range(5)))
    assert [type(one) for one in found] == [dict] * 3 + [QuotaExceeded] * 2
    assert len(rows(database, select(Job))) == 3


def test_a_key_that_comes_twice_at_once_is_one_job_and_one_with_another_body_is_none(
    database: Database, desk: Submissions
) -> None:
    tenant(database)
    found = at_once(desk, wanted("k"), wanted("k"), wanted("k", seed=9), wanted("other"))
    same = [one for one in found[:3] if isinstance(one, dict)]
    told = [one for one in found[:3] if isinstance(one, ApiError)]
    assert {error.status for error in told} == {409}
    assert len({answer["id"] for answer in same}) == 1
    assert len(same) + len(told) == 3
    assert {job.id for job in rows(database, select(Job))} == {same[0]["id"], found[3]["id"]}


def test_a_repeated_request_is_answered_as_before_whatever_is_wrong_by_now(
    database: Database, desk: Submissions
) -> None:
    tenant(database, max_open_jobs=2)
    first = at_once(desk, wanted("a"), wanted("b"))
    again = at_once(desk, wanted("a"), wanted("b"), wanted("c"))
    assert again[:2] == first  # though no more are allowed
    assert isinstance(again[2], QuotaExceeded)
    assert at_once(desk, wanted("a")) == first[:1]


def test_what_may_have_been_committed_is_not_done_again(
    database: Database, desk: Submissions, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant(database)
    whole = database.tenant

    @contextmanager
    def breaks_off(tenant_id: str) -> Iterator[TenantSession]:
        with whole(tenant_id) as session:
            yield session
        raise OperationalError("COMMIT", None, OSError("the connection was lost"))

    monkeypatch.setattr(database, "tenant", breaks_off)
    found = at_once(desk, wanted(), wanted(seed=1), wanted("k"))
    assert [type(one) for one in found] == [OperationalError] * 3
    assert len(rows(database, select(Job))) == 3  # as they were sent, and no more
    monkeypatch.undo()
    again = at_once(desk, wanted("k"))  # who has a key may ask again
    assert again[0]["id"] in {job.id for job in rows(database, select(Job))}
    assert len(rows(database, select(Job))) == 3

"""Keys, quotas, tenants, the audit chain: on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import select, text

from cluster.state import Database, TenantSession
from cluster.state.models import ApiKey, AuditEntry, Tenant
from cluster.tenancy import quotas
from cluster.tenancy.audit import AuditBroken, Link, entries, record, verify
from cluster.tenancy.keys import SCOPES, authenticate, create_key, rotate_key
from cluster.tenancy.tenants import Limits, Policy, change_tenant, create_tenant
from safeft.errors import InputError
from tests.control.rows import add_tenant, file_row, job_row


def make_key(database: Database, tenant_id: str, **options: Any) -> tuple[str, str]:
    with database.system() as session:
        key, shown = create_key(session, tenant_id, name="laptop", now=1.0, **options)
        return key.id, shown


def test_a_key_opens_its_tenant_and_is_kept_nowhere(database: Database) -> None:
    tenant = add_tenant(database)
    key_id, shown = make_key(database, tenant, scopes=["files:read"])
    caller = authenticate(database, shown, 2.0)
    assert caller is not None
    assert (caller.tenant_id, caller.key_id, caller.role) == (tenant, key_id, "tenant")
    assert caller.may("files:read") and not caller.may("files:write")
    secret = shown.split("-")[2]
    with database.system_read() as session:
        row = session.execute(text("SELECT * FROM api_keys")).one()
    assert secret not in str(row)


def test_wrong_expired_revoked_and_suspended_keys_open_nothing(database: Database) -> None:
    tenant = add_tenant(database)
    key_id, shown = make_key(database, tenant, expires_at=10.0)
    prefix = shown.rpartition("-")[0]
    for wrong in ("", "sf-", shown[:-1], shown + "0", f"{prefix}-{'0' * 64}", shown.upper()):
        assert authenticate(database, wrong, 2.0) is None
    assert authenticate(database, shown, 9.9) is not None
    assert authenticate(database, shown, 10.0) is None
    with database.system() as session:
        key = session.get(ApiKey, key_id)
        assert key is not None
        key.revoked_at = 3.0
    assert authenticate(database, shown, 3.0) is None
    _, other = make_key(database, tenant)
    with database.system() as session:
        session.scalars(select(Tenant)).one().suspended_at = 4.0
    assert authenticate(database, other, 4.0) is None


def test_a_rotated_key_ends_at_once_or_after_the_overlap(database: Database) -> None:
    tenant = add_tenant(database)
    for overlap, still in ((0.0, False), (60.0, True)):
        key_id, old = make_key(database, tenant, scopes=["jobs:read"], role="admin")
        with database.system() as session:
            key = session.get(ApiKey, key_id)
            assert key is not None
            _, new = rotate_key(session, key, now=100.0, overlap_s=overlap)
        caller = authenticate(database, new, 100.0)
        assert caller is not None and caller.scopes == {"jobs:read"} and caller.role == "admin"
        assert (authenticate(database, old, 101.0) is not None) is still
        assert authenticate(database, old, 161.0) is None
    with database.system() as session, pytest.raises(InputError, match="the key has ended"):
        ended = session.get(ApiKey, key_id)
        assert ended is not None
        rotate_key(session, ended, now=200.0)


def test_scopes_that_do_not_exist_are_named(database: Database) -> None:
    tenant = add_tenant(database)
    with database.system() as session, pytest.raises(InputError, match="no scope 'files:eat'"):
        create_key(session, tenant, name="x", now=1.0, scopes=["files:eat"])
    with database.system() as session, pytest.raises(InputError, match="at least one"):
        create_key(session, tenant, name="x", now=1.0, scopes=[])
    assert "jobs:write" in SCOPES


def chain(database: Database, count: int = 6) -> list[Link]:
    for number in range(count):
        with database.system() as session:
            record(
                session,
                at=1.1 * number,
                actor="key:x",
                tenant_id=None,
                action="policy.change",
                object_id=f"ten-{number}",
                before={"weight": 0.1 + number, "name": "äöü"},
                after=None,
                reason="because",
            )
    with database.system_read() as session:
        return list(entries(session))


def test_a_chain_that_was_only_written_to_holds(database: Database) -> None:
    links = chain(database)
    found = verify(links, head=links[2].sha256)
    assert (found.entries, found.head) == (6, links[-1].sha256)
    assert [link.seq for link in links[3:]] == [
        link.seq for link in _after(database, after=3, limit=10)
    ]


def _after(database: Database, after: int, limit: int) -> list[Link]:
    with database.system_read() as session:
        return list(entries(session, after, limit))


def test_entries_written_at_once_make_one_chain(database: Database) -> None:
    def write(number: int) -> None:
        with database.system() as session:
            record(session, at=1.0, actor="a", tenant_id=None, action="x", object_id=str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    with database.system_read() as session:
        assert verify(entries(session)).entries == 24


def test_an_entry_falls_with_the_deed_that_failed(database: Database) -> None:
    tenant = add_tenant(database)
    with pytest.raises(RuntimeError), database.tenant(tenant) as session:
        record(session, at=1.0, actor="a", tenant_id=tenant, action="x", object_id="y")
        raise RuntimeError
    with database.system_read() as system:
        assert list(entries(system)) == []


LINKS = 5


def _memory_chain() -> list[Link]:
    links: list[Link] = []
    for seq in range(1, LINKS + 1):
        link = Link(
            seq=seq,
            at=float(seq),
            actor="a",
            tenant_id=None,
            action="x",
            object_id=f"o{seq}",
            before=None,
            after='{"a":1}',
            reason=None,
            previous=links[-1].sha256 if links else "0" * 64,
            sha256="",
        )
        link.sha256 = link.hash()
        links.append(link)
    return links


@given(
    place=st.integers(1, LINKS),
    field=st.sampled_from(["actor", "action", "object_id", "before", "after", "reason", "at"]),
)
def test_a_changed_entry_is_pinpointed(place: int, field: str) -> None:
    links = _memory_chain()
    links[place - 1] = links[place - 1].model_copy(update={field: 99.0 if field == "at" else "z"})
    with pytest.raises(AuditBroken, match=f"entry {place} was changed"):
        verify(links)
    # A forger who also mends the entry's own hash breaks the link to the next one.
    links[place - 1].sha256 = links[place - 1].hash()
    if place < LINKS:
        with pytest.raises(AuditBroken, match=f"entry {place + 1} does not follow"):
            verify(links)
    else:  # the last one has no next: only who kept the head sees it
        with pytest.raises(AuditBroken, match="never was at the hash"):
            verify(links, head=_memory_chain()[-1].sha256)


@given(place=st.integers(1, LINKS))
def test_a_removed_entry_is_pinpointed(place: int) -> None:
    links = _memory_chain()
    head = links[-1].sha256
    del links[place - 1]
    wanted = f"entry {place} is missing" if place < LINKS else "ends at entry 4"
    with pytest.raises(AuditBroken, match=wanted):
        verify(links, head)


def test_changes_of_a_tenant_are_told_before_and_after_with_the_reason(database: Database) -> None:
    who: dict[str, Any] = {"actor": "key:root", "now": 1.0}
    with database.system() as session:
        tenant = create_tenant(session, "acme", reason="new customer", **who)
    with database.system() as session:
        row = session.get(Tenant, tenant.id)
        assert row is not None
        change_tenant(
            session,
            row,
            reason="ticket 7",
            limits=Limits(weight=3.0),
            policy=Policy(min_refusal=0.9),
            suspended=True,
            **who,
        )
    with database.system_read() as session:
        last = session.scalars(select(AuditEntry).order_by(AuditEntry.seq.desc())).first()
    assert last is not None and last.before is not None and last.after is not None
    assert '"weight":1.0' in last.before and '"suspended":false' in last.before
    assert '"weight":3.0' in last.after and '"min_refusal":0.9' in last.after
    assert (last.actor, last.reason, last.object_id) == ("key:root", "ticket 7", tenant.id)
    with database.system() as session, pytest.raises(InputError, match="acme already"):
        create_tenant(session, "acme", reason="again", **who)


def test_a_change_keeps_the_limits_and_the_demands_that_it_does_not_name(
    database: Database,
) -> None:
    who: dict[str, Any] = {"actor": "key:root", "reason": "ticket 8", "now": 1.0}
    limits = Limits(max_gpu_seconds=10.0, max_open_jobs=3)
    policy = Policy(required_constraints=("cwac",), min_refusal=0.9)
    with database.system() as session:
        tenant = create_tenant(session, "acme", limits=limits, policy=policy, **who)
        change_tenant(
            session, tenant, limits=Limits(weight=2.0), policy=Policy(max_over_refusal=0.1), **who
        )
        change_tenant(session, tenant, limits=Limits(max_open_jobs=5), **who)
    with database.system_read() as session:
        row = session.scalars(select(Tenant)).one()
        assert (row.weight, row.max_gpu_seconds, row.max_open_jobs) == (2.0, 10.0, 5)
        assert Policy.model_validate(row.policy) == Policy(
            required_constraints=("cwac",), min_refusal=0.9, max_over_refusal=0.1
        )


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (Policy, {"constraints": ["cwca"]}),
        (Policy, {"constraints": ["frozen"]}),  # has a setting without a default
        (Policy, {"required_constraints": ["cwca"]}),
        (Policy, {"required_constraints": ["frozen"]}),  # any layer would do
        (Policy, {"max_task_loss": float("inf")}),
        (Limits, {"max_gpu_seconds": float("inf")}),
        (Limits, {"requests_per_second": float("nan")}),
    ],
)
def test_a_demand_that_nothing_can_meet_or_read_is_refused(
    made: type[Policy] | type[Limits], given: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError):
        made(**given)


def check_submit(session: TenantSession) -> None:
    tenant = session.rows(quotas.LOCKED).one()
    quotas.check_submit(tenant, quotas.usage(session, tenant))


def test_open_jobs_are_limited_and_finished_ones_do_not_count(database: Database) -> None:
    tenant = add_tenant(database, max_open_jobs=2)
    with database.system() as session:
        session.add_all([job_row(tenant, "a"), job_row(tenant, "b", phase="failed")])
    with database.tenant(tenant) as mine:
        check_submit(mine)
        mine.add(job_row(tenant, "c", phase="training"))
    with database.tenant(tenant) as mine, pytest.raises(quotas.QuotaExceeded, match="2 jobs"):
        check_submit(mine)


def test_a_quota_holds_where_submissions_come_at_once(database: Database) -> None:
    tenant = add_tenant(database, max_open_jobs=5)

    def submit(number: int) -> bool:
        try:
            with database.tenant(tenant) as session:
                check_submit(session)
                session.add(job_row(tenant, f"job-{number}"))
        except quotas.QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(submit, range(20))) == 5


def test_worker_seconds_are_counted_and_limited(database: Database) -> None:
    tenant = add_tenant(database, max_gpu_seconds=100.0)
    with database.system() as session:
        session.add(job_row(tenant, "a", phase="succeeded"))
        session.flush()
        session.execute(
            text(
                "INSERT INTO stages (tenant_id, job_id, attempt, stage, slots, started_at, "
                "ended_at, seen) VALUES ('ten_a', 'a', 1, 'training', 4, 10, 30, 0), "
                "('ten_a', 'a', 2, 'screening', 1, 0, 1000, 0), "
                "('ten_a', 'a', 3, 'evaluating', 1, 30, NULL, 0)"
            )
        )
    with database.tenant(tenant) as mine:
        assert quotas.gpu_seconds(mine, tenant) == 80.0
        check_submit(mine)
        tenant_row = mine.get(Tenant, tenant)
        assert tenant_row is not None
        tenant_row.max_gpu_seconds = 80.0
        with pytest.raises(quotas.QuotaExceeded, match="80 of 80 worker-seconds"):
            check_submit(mine)


def test_storage_counts_files_that_are_not_deleted(database: Database) -> None:
    tenant = add_tenant(database, max_storage_bytes=100)
    with database.system() as session:
        session.add(file_row(tenant, "a", bytes=60))
        session.add(file_row(tenant, "b", bytes=30, deleted_at=2.0))
    with database.tenant(tenant) as mine:
        assert quotas.storage_left(mine) == 40
        assert quotas.storage_left(mine, besides="a") == 100


def test_a_rate_is_kept_for_each_tenant() -> None:
    now = [0.0]
    limiter = quotas.RateLimiter(clock=lambda: now[0])
    assert [limiter.wait_s("a", 2.0) for _ in range(4)] == [0.0] * 4
    assert limiter.wait_s("a", 2.0) == pytest.approx(0.5)
    assert limiter.wait_s("b", 2.0) == 0.0
    now[0] = 0.5
    assert limiter.wait_s("a", 2.0) == 0.0
    assert limiter.wait_s("a", 2.0) > 0.0

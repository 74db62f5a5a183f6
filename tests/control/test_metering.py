"""Tokens of served models, counted for their tenants, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from cluster.state import Database
from cluster.state.models import ChatUsage
from cluster.tenancy import quotas
from cluster.tenancy.metering import Meter
from tests.control.rows import add_tenant

DAY_S = 86400.0


def used(database: Database, tenant: str) -> dict[str, int]:
    with database.tenant_read(tenant) as session:
        return quotas.chat_usage(session)


def test_several_processes_count_for_the_same_tenant_and_day(database: Database) -> None:
    a, b = add_tenant(database, "ten_a"), add_tenant(database, "ten_b")
    meters = [Meter(database, lambda: 3.5 * DAY_S, every_s=3600) for _ in range(4)]

    def work(meter: Meter) -> None:
        for _ in range(20):
            meter.add(a, "base", 10, 1)
            meter.add(b, "base", 0, 1)
            meter.add(a, "ft:mine", 5, 2)
            meter.flush()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, meters))
    assert used(database, a) == {
        "requests": 160,
        "prompt_tokens": 80 * 15,
        "completion_tokens": 80 * 3,
    }
    assert used(database, b)["completion_tokens"] == 80
    with database.tenant_read(a) as session:
        rows = session.scalars(select(ChatUsage).order_by(ChatUsage.model)).all()
        assert [(row.day, row.model, row.requests) for row in rows] == [
            (3, "base", 80),
            (3, "ft:mine", 80),
        ]


def test_what_cannot_be_written_now_is_written_later(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    tenant = add_tenant(database)
    meter = Meter(database, every_s=3600)
    meter.add(tenant, "base", 10, 1)

    def gone() -> None:
        raise OperationalError("", {}, Exception("the database restarts"))

    with monkeypatch.context() as broken:
        broken.setattr(database, "system", gone)
        meter.flush()
    meter.add(tenant, "base", 10, 1)
    assert meter.pending(tenant) == 22
    assert used(database, tenant)["requests"] == 0
    meter.flush()
    assert meter.pending(tenant) == 0
    assert used(database, tenant) == {
        "requests": 2,
        "prompt_tokens": 20,
        "completion_tokens": 2,
    }
    database.close()


def test_it_is_written_without_being_told_to(sqlite_url: str) -> None:
    from tests.control.chat_world import waited

    database = Database(sqlite_url)
    tenant = add_tenant(database)
    Meter(database, every_s=0.01).add(tenant, "base", 1, 1)
    waited(lambda: used(database, tenant)["requests"] == 1)
    database.close()

"""The database: migrations, transactions, and the wall between tenants, on both databases."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    bindparam,
    delete,
    func,
    insert,
    inspect,
    literal_column,
    or_,
    select,
    text,
    true,
    union,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import aliased

from cluster.state import Database, narrowed
from cluster.state.database import DatabaseError
from cluster.state.models import AuditEntry, Base, File, Job, Tenant
from safeft.errors import InputError
from tests.control.postgresql import execute
from tests.control.rows import add_tenant, file_row, job_row


def test_migrations_make_the_models_and_take_them_away_again(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    database.migrate("base")
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    database.migrate()
    database.require_current()
    database.close()


def test_several_processes_may_migrate_at_once(empty_url: str) -> None:
    databases = [Database(empty_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda d: d.migrate(), databases))
    for database in databases:
        database.require_current()
        database.close()


def test_an_old_schema_is_told_and_not_used(empty_url: str) -> None:
    database = Database(empty_url)
    with pytest.raises(DatabaseError, match=r"schema is empty.*safeft database migrate"):
        database.require_current()
    database.close()


def test_a_database_that_is_not_there_is_named_without_its_password() -> None:
    database = Database("postgresql://me:hunter2@127.0.0.1:1/x?connect_timeout=1")
    with pytest.raises(DatabaseError) as caught:
        database.require_current()
    assert "127.0.0.1:1" in str(caught.value) and "hunter2" not in str(caught.value)


def test_a_url_that_is_refused_is_named_without_its_password() -> None:
    with pytest.raises(InputError, match="mysql://me") as caught:
        Database("mysql://me:hunter2@host/x")
    assert "hunter2" not in str(caught.value)


def test_an_error_of_the_database_holds_no_values(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    query = text("SELECT :secret FROM nowhere")
    with pytest.raises(DBAPIError, match="nowhere") as caught, database.system() as session:
        session.execute(query, {"secret": "hunter2"})
    assert "hunter2" not in str(caught.value)
    database.close()


@pytest.mark.parametrize("url", ["", "mysql://x/y", "sqlite:///relative.db", "sqlite://", "no"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="database: must be"):
        Database(url)


def test_a_tenants_session_finds_nothing_of_another(database: Database) -> None:
    a, b = add_tenant(database, "ten_a"), add_tenant(database, "ten_b")
    with database.system() as system:
        system.add_all([file_row(a, "file-a"), file_row(b, "file-b"), job_row(b, "job-b")])
    with database.tenant(a) as session:
        assert [f.id for f in session.scalars(select(File))] == ["file-a"]
        assert session.get(File, "file-a") is not None
        assert session.get(File, "file-b") is None
        assert session.scalars(select(File.id).where(File.id == "file-b")).all() == []
        assert session.execute(select(aliased(File).id)).all() == [("file-a",)]
        joined = select(File.id, Job.id).join(Job, Job.training_file != File.id)
        assert session.execute(joined).all() == []
        with_a_job = select(File.id).where(select(Job.id).where(Job.events == 0).exists())
        assert session.execute(with_a_job).all() == []
        assert session.scalars(select(func.count(Job.id))).one() == 0
        assert session.scalars(select(Tenant.id)).all() == [a]
        session.execute(delete(Job))
    with database.system_read() as system:
        names = {file.id: file.filename for file in system.scalars(select(File))}
        assert names == {"file-a": "rows.jsonl", "file-b": "rows.jsonl"}
        assert system.get(Job, "job-b") is not None


def test_a_tenants_session_writes_nothing_of_another(database: Database) -> None:
    a, b = add_tenant(database, "ten_a"), add_tenant(database, "ten_b")
    with pytest.raises(PermissionError), database.tenant(a) as session:
        session.add(file_row(b, "file-b"))
    with pytest.raises(PermissionError), database.tenant(a) as session:
        session.insert([file_row(b, "file-b")])
    with database.tenant(a) as session:
        session.insert([file_row(a, "file-a")])
    with pytest.raises(PermissionError), database.tenant(a) as session:
        found = session.get(File, "file-a")
        assert found is not None
        found.tenant_id = b
    foreign = {c.key: getattr(file_row(b, "file-c"), c.key) for c in File.__table__.columns}
    for statement in (insert(File).values(**foreign), update(File).values(tenant_id=b)):
        with pytest.raises(PermissionError), database.tenant(a) as session:
            session.execute(statement)


def test_a_tenants_session_takes_no_plain_sql_and_no_table_without_tenant(
    database: Database,
) -> None:
    a = add_tenant(database)
    for statement in (
        text("SELECT * FROM files"),
        select(AuditEntry),
        select(File.__table__),
        select(File).where(text("1=1 OR 1=1")),
        select(File.id).where(literal_column("1=1 OR 1=1")),
        select(File.id).where(File.id.op("OR", precedence=100)(true())),
        select(File.id).suffix_with(text("UNION ALL SELECT id FROM jobs")),
        delete(File).where(text("1=1 OR 1=1")),
    ):
        with pytest.raises(PermissionError), database.tenant(a) as session:
            session.execute(statement)


def test_a_query_that_is_narrowed_once_finds_nothing_of_another(database: Database) -> None:
    a, b = add_tenant(database, "ten_a"), add_tenant(database, "ten_b")
    with database.system() as system:
        system.add_all([file_row(a, "file-a"), file_row(b, "file-b"), job_row(b, "job-b")])
    files, jobs, tenants = File.__table__, Job.__table__, Tenant.__table__
    one = narrowed(select(files.c.id).where(files.c.id == bindparam("named")))
    both = narrowed(select(files.c.id, jobs.c.id).where(jobs.c.training_file != files.c.id))
    either = narrowed(select(files.c.id).where(or_(files.c.id == "file-a", files.c.bytes >= 0)))
    with database.tenant(a) as session:
        assert session.rows(one, named="file-a").all() == [("file-a",)]
        assert session.rows(one, named="file-b").all() == []
        assert session.rows(either).all() == [("file-a",)]
        assert session.rows(both).all() == []
        assert session.rows(narrowed(select(func.count(jobs.c.id)))).scalar_one() == 0
        assert session.rows(narrowed(select(tenants.c.id))).all() == [(a,)]


def test_a_query_that_cannot_be_narrowed_once_is_refused() -> None:
    files, jobs, audit = File.__table__, Job.__table__, AuditEntry.__table__
    foreign = select(jobs.c.id)
    for query in (
        select(audit),
        select(text("1")),
        select(files.alias()),
        select(files.c.id).where(foreign.exists()),
        select(files.c.id, foreign.scalar_subquery()),
        select(foreign.subquery()),
        select(files.c.id).join_from(files, jobs, files.c.id == jobs.c.training_file),
        select(foreign.cte()),
        select(union(foreign, foreign).subquery()),
        select(files.c.id).where(text("1=1 OR 1=1")),
        select(files.c.id).where(literal_column("1=1 OR 1=1")),
        select(files.c.id).where(files.c.id.op("OR", precedence=100)(true())),
        select(files.c.id).add_columns(text("(SELECT max(secret_sha256) FROM api_keys)")),
        select(files.c.id).suffix_with(text("UNION ALL SELECT id FROM jobs")),
        select(files.c.id).with_statement_hint("UNION ALL SELECT id FROM jobs"),
        select(files.c.id).add_cte(delete(jobs).returning(jobs.c.id).cte()),
    ):
        with pytest.raises(PermissionError):
            narrowed(query)


def test_a_session_without_a_tenant_cannot_be_made(database: Database) -> None:
    with pytest.raises(AssertionError), database.tenant(""):
        pass


def test_an_error_rolls_the_whole_transaction_back(database: Database) -> None:
    a = add_tenant(database)
    with pytest.raises(RuntimeError), database.tenant(a) as session:
        session.add(file_row(a, "file-a"))
        session.flush()
        raise RuntimeError
    with database.tenant_read(a) as session:
        assert session.get(File, "file-a") is None


def test_writers_do_not_fail_because_another_writes(database: Database) -> None:
    a = add_tenant(database)

    def increase(_: int) -> None:
        with database.tenant(a) as session:
            tenant = session.scalars(select(Tenant).with_for_update()).one()
            tenant.compute_time += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(increase, range(40)))
    with database.tenant_read(a) as session:
        assert session.scalars(select(Tenant.compute_time)).one() == 40


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    a = add_tenant(database)
    read = threading.Event()

    def reader() -> None:
        with database.tenant_read(a) as session:
            session.scalars(select(File)).all()
        read.set()

    with database.tenant(a) as session:
        session.add(file_row(a, "file-a"))
        session.flush()
        threading.Thread(target=reader, daemon=True).start()
        assert read.wait(10)


def test_connections_that_postgresql_ended_are_replaced_before_anybody_notices(
    postgres: str,
) -> None:
    database = Database(postgres.format(name="postgres"))
    backend = text("SELECT pg_backend_pid()")
    with database.system() as one, database.system() as other:
        ended = {one.scalar(backend), other.scalar(backend)}
    execute(
        postgres, f"SELECT pg_terminate_backend(pid, 60000) FROM unnest(ARRAY{list(ended)}) pid"
    )
    for _ in range(2):
        with database.system() as session:
            assert session.scalar(backend) not in ended
    database.close()


def test_the_audit_table_can_only_grow(database: Database) -> None:
    link = {"at": 1.0, "actor": "x", "action": "y", "object_id": "z", "previous": "", "sha256": ""}
    with database.system() as session:
        session.add(AuditEntry(seq=1, **link))
    for statement in ("UPDATE audit SET actor = 'w'", "DELETE FROM audit"):
        with pytest.raises(DBAPIError, match="append-only"), database.system() as session:
            session.execute(text(statement))


def test_sqlite_is_in_wal_mode_and_what_was_written_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep/state.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    with database.system_read() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert session.execute(text("PRAGMA synchronous")).scalar() == 1  # SQLite flushes no log
    sizes, fsync, log = [], os.fsync, Path(f"{path}-wal")

    def counted(descriptor: int) -> None:
        assert os.path.samestat(os.fstat(descriptor), log.stat())
        sizes.append(log.stat().st_size)
        fsync(descriptor)

    before = log.stat().st_size
    monkeypatch.setattr(os, "fsync", counted)
    add_tenant(database)
    assert [size > before for size in sizes] == [True]  # once, after the commit
    database.close()

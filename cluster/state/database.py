"""The database by URL: SQLite in WAL mode, or PostgreSQL. Sessions, and the schema's version."""

from __future__ import annotations

import select
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    Row,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, TimeoutError
from sqlalchemy.orm import Session

from cluster.state.group_commit import GroupCommit
from cluster.state.sessions import TenantSession
from cluster.state.turns import Turns
from cluster.write_ahead import use_write_ahead_log
from safeft.errors import InputError, SafeftError

if TYPE_CHECKING:  # only who uses PostgreSQL loads its driver
    from psycopg import Connection as PostgresConnection

_BUSY_TIMEOUT_S = 30.0
_MIGRATION_LOCK = 0x5AFE_F7  # any number, the same in every process
_READ = "safeft_read"
#: A server that vanished without a word is noticed in half a minute, not in a quarter of an hour.
_POSTGRES_LIMITS = {
    "connect_timeout": 10,  # s
    "tcp_user_timeout": 10_000,  # ms
    "keepalives_idle": 10,  # s
    "keepalives_interval": 5,  # s
    "keepalives_count": 3,
}
_POSTGRES_RECYCLE_S = (
    240.0  # what stands between may forget connections that say nothing for longer
)
#: Transactions that write to PostgreSQL at a time: most wait for the same rows, and all take turns.
_WRITERS = 2


class DatabaseError(SafeftError):
    """The database is not there, or has another schema than this version."""


#: The database failed, no connection or turn to write came free in time, or it is not as it should.
UNAVAILABLE = (DBAPIError, TimeoutError, DatabaseError)


class Database:
    """Where the control plane's state is. Safe to share between threads.

    Args:
        url: ``sqlite:////absolute/path`` or ``postgresql://user@host/name``.

    Raises:
        InputError: the URL names no database that is supported.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._writers = Turns(1 if self.is_sqlite else _WRITERS, _BUSY_TIMEOUT_S)
        log = Path(f"{self.engine.url.database}-wal")
        self._group = GroupCommit(log, self._writers) if self.is_sqlite else None
        self._reader = self.engine.execution_options(**{_READ: "snapshot"})
        autocommit = {} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        self._single = self.engine.execution_options(**{_READ: "statement"}, **autocommit)

    @property
    def is_sqlite(self) -> bool:
        """SQLite; otherwise it is PostgreSQL."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def system(self) -> Iterator[Session]:
        """A transaction over all tenants: for the controller and administrators.

        Committed at the end, rolled back on an error. Keep it short: SQLite has one writer.
        """
        with Session(self.engine, expire_on_commit=False) as session, self._transaction(session):
            yield session

    @contextmanager
    def tenant(self, tenant_id: str) -> Iterator[TenantSession]:
        """A transaction in which only this tenant's rows exist."""
        with (
            TenantSession(tenant_id, bind=self.engine, expire_on_commit=False) as session,
            self._transaction(session),
        ):
            yield session

    @contextmanager
    def system_read(self) -> Iterator[Session]:
        """Like `system`, to read only: waits for nobody."""
        with Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def tenant_read(self, tenant_id: str) -> Iterator[TenantSession]:
        """Like `tenant`, to read only: waits for nobody."""
        with (
            TenantSession(tenant_id, bind=self._reader, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def rows(self, query: Executable, values: dict[str, Any]) -> Sequence[Row[Any]]:
        """The rows of a query over all tenants: one statement, no transaction."""
        with self._single.connect() as connection:
            return connection.execute(query, values).all()

    def migrate(self, revision: str = "head") -> None:
        """Bring the schema to a revision, all of it or nothing; "base" removes every table.

        Several processes may do so at once.
        """
        current = _head()
        with self.engine.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            config = _config()
            config.attributes["connection"] = connection
            if revision == "head" or revision == current:
                command.upgrade(config, revision)
            else:
                command.downgrade(config, revision)
        self.flush()

    def flush(self) -> None:
        """Return when all that was committed before is on the disk; PostgreSQL's always is."""
        if self._group is not None:
            self._group.flush()

    def require_current(self) -> None:
        """Raise DatabaseError unless the schema is this version's."""
        wanted = _head()
        try:
            with self.engine.connect() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
        except (DBAPIError, TimeoutError) as error:
            why = error.orig if isinstance(error, DBAPIError) else error
            raise DatabaseError(f"{self.shown}: cannot be reached ({why})") from error
        if found != wanted:
            raise DatabaseError(
                f"{self.shown}: its schema is {found or 'empty'}, this version needs {wanted}; "
                "run `safeft database migrate`"
            )

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()

    @contextmanager
    def _transaction(self, session: Session) -> Iterator[None]:
        if self._group is not None:
            with self._group.transaction(session):
                yield
        else:
            with self._writers, session.begin():
                yield


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InputError(
            "database: must be sqlite:////absolute/path or postgresql://..., and is neither"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(
            parsed,
            pool_size=16,
            max_overflow=16,
            pool_recycle=_POSTGRES_RECYCLE_S,
            connect_args={k: v for k, v in _POSTGRES_LIMITS.items() if k not in parsed.query},
            hide_parameters=True,
        )
        event.listen(engine, "checkout", _check_postgres)
        return engine
    if backend != "sqlite" or not parsed.database or not Path(parsed.database).is_absolute():
        raise InputError(
            "database: must be sqlite:////absolute/path or postgresql://..., not "
            f"{parsed.render_as_string(hide_password=True)}"
        )
    Path(parsed.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(
        parsed,
        pool_size=16,
        max_overflow=16,
        hide_parameters=True,  # tenants' values are in no error that may be logged
        connect_args={"timeout": _BUSY_TIMEOUT_S},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _check_postgres(connection: PostgresConnection[Any], *_: Any) -> None:
    """Have the pool open another connection for one that the server has ended.

    Its end stands there to be read. To ask the server, as `pool_pre_ping` does, takes as long as
    what the connection is wanted for.
    """
    ended = select.poll()
    ended.register(connection.fileno(), select.POLLIN)
    if ended.poll(0):
        raise DisconnectionError


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # the driver starts no transaction; _begin_sqlite does
    use_write_ahead_log(connection, _BUSY_TIMEOUT_S)
    # An answered request is on the disk, also when the power goes: GroupCommit sees to it.
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    read = connection.get_execution_options().get(_READ)
    if read != "statement":
        # Who reads first and writes later would fail where another one wrote meanwhile.
        connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


@cache  # it reads every migration, and whoever asks for our health asks for it
def _head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()

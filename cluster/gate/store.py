"""The gate's memory: a database, by default one SQLite file. Survives every restart."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from cluster.gate.policy import Policy, Round
from cluster.gate.record import Event, Record
from cluster.gate.states import State
from cluster.write_ahead import use_write_ahead_log
from safeft.errors import SafeftError
from safeft.sprt import SPRT

_BUSY_TIMEOUT_S = 5.0  # the driver's own, of every other statement
_tables = sa.MetaData()
_records = sa.Table(
    "gate_records",
    _tables,
    sa.Column("model", sa.String(255), primary_key=True),
    sa.Column("weights", sa.String(64), primary_key=True),
    sa.Column("content", sa.Text, nullable=False),
)
_events = sa.Table(
    "gate_events",
    _tables,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("model", sa.String(255), nullable=False, index=True),
    sa.Column("weights", sa.String(64), nullable=False),
    *(sa.Column(name, sa.String(32), nullable=False) for name in ("before", "after", "trigger")),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
)


class GateStateError(SafeftError):
    """What the gate had stored cannot be read or written. Nothing is healthy without it."""


class GateStore(Protocol):
    """Where records and events are kept. One gate writes to it."""

    def load(self) -> list[Record]:
        """Every record."""

    def save(self, record: Record, event: Event | None = None) -> None:
        """Insert or replace the record, and append the event, both or neither."""

    def remove(self, record: Record, event: Event) -> None:
        """Forget the record; its events stay."""

    def events(self, model: str | None = None, limit: int = 100) -> list[Event]:
        """The latest events, of one model or of all, oldest first."""

    def verdict(self, model: str, weights: str) -> Event | None:
        """The last event that says how these weights were judged, also after they were retired.

        That is none of a registration or a retirement, and none that led to `restoring`.
        """


class SqlGateStore:
    """A GateStore in any database that SQLAlchemy reaches.

    Raises:
        GateStateError: the database cannot be opened or written, or holds something else.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._translated(lambda: _tables.create_all(engine))

    @staticmethod
    def at(file: Path) -> SqlGateStore:
        """In an SQLite file, made if it is not there."""
        return SqlGateStore(sqlite_engine(file))

    def load(self) -> list[Record]:
        """See GateStore."""
        query = sa.select(_records.c.content).order_by(_records.c.model)
        rows = self._translated(lambda: self._read(query))
        try:
            return [_decode(row.content) for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise GateStateError(
                f"{self._engine.url}: holds a record that this version cannot read ({error})"
            ) from error

    def save(self, record: Record, event: Event | None = None) -> None:
        """See GateStore."""
        self._write(
            record,
            _records.insert().values(
                model=record.model, weights=record.weights, content=_encode(record)
            ),
            event,
        )

    def remove(self, record: Record, event: Event) -> None:
        """See GateStore."""
        self._write(record, None, event)

    def events(self, model: str | None = None, limit: int = 100) -> list[Event]:
        """See GateStore."""
        query = sa.select(_events).order_by(_events.c.number.desc()).limit(limit)
        if model is not None:
            query = query.where(_events.c.model == model)
        return [_event(row) for row in reversed(self._translated(lambda: self._read(query)))]

    def verdict(self, model: str, weights: str) -> Event | None:
        """See GateStore."""
        query = (
            sa.select(_events)
            .where(
                _events.c.model == model,
                _events.c.weights == weights,
                _events.c.trigger.not_in(("registered", "retired")),
                _events.c.after != State.restoring.value,
            )
            .order_by(_events.c.number.desc())
            .limit(1)
        )
        rows = self._translated(lambda: self._read(query))
        return _event(rows[0]) if rows else None

    def _write(self, record: Record, insert: sa.Insert | None, event: Event | None) -> None:
        def write() -> None:
            with self._engine.begin() as connection:
                connection.execute(
                    _records.delete().where(
                        _records.c.model == record.model, _records.c.weights == record.weights
                    )
                )
                if insert is not None:
                    connection.execute(insert)
                if event is not None:
                    connection.execute(_events.insert().values(**asdict(event)))

        self._translated(write)

    def _read(self, query: sa.Select[Any]) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(query))

    def _translated(self, work: Any) -> Any:
        try:
            return work()
        except DBAPIError as error:
            raise GateStateError(f"{self._engine.url}: {error.orig}") from error


def sqlite_engine(file: Path) -> sa.Engine:
    """A database in one file, made if it is not there, that is safe against a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{file}")
    sa.event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    use_write_ahead_log(connection, _BUSY_TIMEOUT_S)
    connection.execute("PRAGMA synchronous=FULL")  # a quarantine outlives a power cut


def _event(row: sa.Row[Any]) -> Event:
    fields = dict(row._mapping)
    del fields["number"]
    fields["before"], fields["after"] = State(fields["before"]), State(fields["after"])
    return Event(**fields)


def _encode(record: Record) -> str:
    return json.dumps(asdict(record), allow_nan=False)


def _decode(content: str) -> Record:
    fields = json.loads(content)
    policy = fields["policy"]
    fields["policy"] = Policy(
        SPRT(**policy["refusals"]), SPRT(**policy["over_refusals"]), policy["max_age_s"]
    )
    fields["round"] = Round(**fields["round"])
    fields["state"] = State(fields["state"])
    return Record(**fields)

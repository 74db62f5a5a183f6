"""SQLite's write-ahead log is switched on while others open the same file."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cluster.write_ahead import use_write_ahead_log


def test_who_opens_a_new_database_waits_for_who_is_writing_to_it(tmp_path: Path) -> None:
    first, second = _opened_twice(tmp_path)
    first.execute("BEGIN IMMEDIATE")
    pauses: list[float] = []

    def first_commits(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            first.execute("COMMIT")

    use_write_ahead_log(second, 30.0, sleep=first_commits)
    assert len(pauses) == 2
    assert second.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_who_keeps_a_database_for_too_long_is_an_error(tmp_path: Path) -> None:
    first, second = _opened_twice(tmp_path)
    first.execute("BEGIN IMMEDIATE")
    now = [0.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        use_write_ahead_log(second, 1.0, clock=lambda: now[0], sleep=passes)
    assert now[0] == pytest.approx(1.0, abs=0.02)


def test_a_file_that_is_no_database_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("no database" * 200)
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        use_write_ahead_log(connection, 30.0, sleep=lambda _: pytest.fail("waits for nobody"))
    connection.close()


def _opened_twice(tmp_path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    first, second = (
        sqlite3.connect(tmp_path / "a.db", isolation_level=None, timeout=0.0) for _ in range(2)
    )
    first.execute("CREATE TABLE t (x)")
    return first, second

"""SQLite's one writer at a time, and one flush of the disk for all that waited for it.

SQLite can flush in each commit, but then everybody who waits for the writer waits for the disk too.
Here a commit only appends to the write-ahead log (``synchronous=NORMAL``); the next transaction
goes on, and who committed waits until the log is on the disk. Nobody returns before that.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from cluster.state.turns import Turns


class GroupCommit:
    """The write transactions of one process on one SQLite database. Safe to share by threads.

    Args:
        log: the database's write-ahead log.
        writer: the turns of its one writer.
    """

    def __init__(self, log: Path, writer: Turns) -> None:
        self._log, self._writer = log, writer
        self._counting, self._flushing = threading.Lock(), threading.Lock()
        self._committed = self._flushed = 0

    @contextmanager
    def transaction(self, session: Session) -> Iterator[None]:
        """Run the block as the one writer and commit; at its end all of it is on the disk."""
        with self._writer:
            with session.begin():
                raw = session.connection().connection.driver_connection
                assert isinstance(raw, sqlite3.Connection)
                before = raw.total_changes
                yield
            changed = raw.total_changes != before  # or there is nothing to flush
        if changed:
            self.flush()

    def flush(self) -> None:
        """Return when all that was committed before is on the disk.

        Raises:
            OperationalError: the disk failed.
        """
        with self._counting:
            self._committed += 1
            mine = self._committed
        with self._flushing:
            if self._flushed >= mine:
                return  # a flush that began after our commit has ended
            with self._counting:
                reached = self._committed
            try:
                _flush(self._log)
            except OSError as error:
                raise OperationalError("flush of the write-ahead log", None, error) from error
            self._flushed = reached


def _flush(log: Path) -> None:
    try:
        descriptor = os.open(log, os.O_RDONLY)
    except FileNotFoundError:
        return  # it became part of the database, which SQLite flushes before it removes the log
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

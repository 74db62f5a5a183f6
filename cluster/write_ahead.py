"""SQLite's write-ahead log, switched on in a file that others may be opening too."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

_PAUSE_S = 0.01


def use_write_ahead_log(
    connection: sqlite3.Connection,
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Put the database into WAL mode, which lasts; nothing happens where it is in it already.

    SQLite waits here for who reads, but not for who is about to write (it cannot know that neither
    waits for the other), so that of two who open a new file one fails at once. We wait for both.

    Args:
        connection: outside a transaction.
        timeout_s: seconds to wait for others.

    Raises:
        sqlite3.OperationalError: others kept the file for longer, or it cannot be written.
    """
    until = clock() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY  # whichever kind of busy
            if not busy or clock() >= until:
                raise
        sleep(_PAUSE_S)

"""A few places, given in the order in which they were asked for."""

from __future__ import annotations

import threading
from collections import deque

from sqlalchemy.exc import TimeoutError as NoTurn


class Turns:
    """At most `places` threads are inside at a time; a lock of Python's lets any of them be next.

    Where many wait for the database, that leaves the unlucky one waiting many times as long.

    Raises:
        sqlalchemy.exc.TimeoutError: on entering, if no place came free for `timeout_s`.
    """

    def __init__(self, places: int, timeout_s: float) -> None:
        self._free, self._timeout_s = places, timeout_s
        self._counting = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._counting:
            if self._free:
                self._free -= 1
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        got = False
        try:
            got = mine.acquire(timeout=self._timeout_s)  # until who leaves hands us the place
        finally:  # also where Ctrl-C came: nobody may hand a place to who is not there
            if not got:
                self._leave_queue(mine)
        if not got:
            raise NoTurn(f"no turn to write to the database came for {self._timeout_s:g} s")

    def __exit__(self, *_: object) -> None:
        with self._counting:
            self._hand_over()

    def _leave_queue(self, mine: threading.Lock) -> None:
        with self._counting:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:  # it was handed to us in the meantime
                self._hand_over()

    def _hand_over(self) -> None:
        if self._waiting:
            self._waiting.popleft().release()
        else:
            self._free += 1

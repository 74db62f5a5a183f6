"""A few places, given in the order in which they were asked for."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """At most `places` threads are inside at a time; a lock of Python's lets any of them be next.

    Where many wait for the database, that leaves the unlucky one waiting many times as long.
    """

    def __init__(self, places: int) -> None:
        self._free = places
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
        mine.acquire()  # until who leaves hands us the place

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._counting:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

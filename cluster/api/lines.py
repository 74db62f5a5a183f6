"""What many requests want of the database at the same time, done for all of them at once.

A way to a thread and a transaction take longer than what one request does there. So who comes while
others are being served waits in a line, and the whole line is served next.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, Generic, TypeVar

from fastapi.concurrency import run_in_threadpool

Item = TypeVar("Item")
Found = TypeVar("Found")
#: Databases bound the parameters of a statement.
_MOST = 500


class Lines(Generic[Item, Found]):
    """Lines by name, each served by one thread at a time, as long as it does not hang.

    Args:
        serve: called in a thread with a whole line; what it returns for each item is what waits for
            it gets, and raises where that is an exception.
        patience_s: after which the next line is served beside one that takes longer: it may wait
            for a database that is gone.
    """

    def __init__(
        self,
        serve: Callable[[Sequence[Item]], Sequence[Found | Exception]],
        patience_s: float = 1.0,
    ) -> None:
        self._serve, self._patience_s = serve, patience_s
        self._waiting: dict[Hashable, list[tuple[Item, asyncio.Future[Found]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, name: Hashable, item: Item) -> Found:
        """Wait in the line of this name, and be served."""
        loop = asyncio.get_running_loop()
        mine = item, loop.create_future()
        here = loop, name  # another event loop's requests are woken by another thread
        if (line := self._waiting.get(here)) is not None:
            line.append(mine)
        else:
            self._waiting[here] = [mine]
            self._begin(self._until_empty(here))
        found: Found = await mine[1]
        return found

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of its own: it goes on when the request that began it is given up."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _until_empty(self, here: Hashable) -> None:
        waiting = self._waiting[here]
        try:
            while waiting:
                line, waiting[:] = waiting[:_MOST], waiting[_MOST:]
                await asyncio.wait({self._begin(self._served(line))}, timeout=self._patience_s)
        finally:
            del self._waiting[here]
            _give_up(waiting)

    async def _served(self, line: Sequence[tuple[Item, asyncio.Future[Found]]]) -> None:
        try:
            work = run_in_threadpool(self._serve, [item for item, _ in line])
            (served,) = await asyncio.gather(work, return_exceptions=True)
            found = [served] * len(line) if isinstance(served, BaseException) else served
            for (_, future), one in zip(line, found, strict=True):
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(one, BaseException):
                    future.set_exception(_own(one))
                else:
                    future.set_result(one)
        finally:
            _give_up(line)


def _own(error: BaseException) -> BaseException:
    """The error for one request: each that raises it adds its traceback and context to it."""
    try:
        mine = copy.copy(error)
    except Exception:  # noqa: BLE001  (whatever its class raises there)
        return error
    if mine.args != error.args:  # its class makes the message of what it is given
        return error
    mine.__cause__ = error
    return mine


def _give_up(line: Sequence[tuple[Any, asyncio.Future[Any]]]) -> None:
    """Nobody waits for ever, whatever happened."""
    for _, future in line:
        future.cancel()

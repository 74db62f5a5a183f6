"""What many requests want of the database at the same time, done for all of them at once.

A way to a thread and a transaction take longer than what one request does there. So who comes while
others are being served waits in a line, and the whole line is served next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from fastapi.concurrency import run_in_threadpool

Item = TypeVar("Item")
Found = TypeVar("Found")


class Lines(Generic[Item, Found]):
    """Lines of one event loop; each is served by one thread at a time.

    Args:
        serve: called in a thread with a whole line; what it returns for each item is what waits for
            it gets, and raises where that is an exception.
    """

    def __init__(self, serve: Callable[[Sequence[Item]], Sequence[Found | Exception]]) -> None:
        self._serve = serve
        self._waiting: dict[Hashable, list[tuple[Item, asyncio.Future[Found]]]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def join(self, name: Hashable, item: Item) -> Found:
        """Wait in the line of this name, and be served."""
        loop = asyncio.get_running_loop()
        mine = item, loop.create_future()
        if (line := self._waiting.get(name)) is not None:
            line.append(mine)
        else:
            self._waiting[name] = [mine]
            # A task of its own: it goes on when the request that began it is given up.
            task = loop.create_task(self._until_empty(name))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        found: Found = await mine[1]
        return found

    async def _until_empty(self, name: Hashable) -> None:
        while line := self._waiting[name]:
            self._waiting[name] = []
            work = run_in_threadpool(self._serve, [item for item, _ in line])
            (served,) = await asyncio.gather(work, return_exceptions=True)
            found = [served] * len(line) if isinstance(served, BaseException) else served
            for (_, future), one in zip(line, found, strict=True):
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(one, BaseException):
                    future.set_exception(one)
                else:
                    future.set_result(one)
        del self._waiting[name]

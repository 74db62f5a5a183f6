"""Answers that stay open: a tenant may have so many of a kind at a time, in this process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

from fastapi import Depends

from cluster.api_errors import ApiError


class OpenAnswers:
    """Counts the open answers of one kind by tenant.

    Args:
        most: of a tenant at a time.
        code: of the error that the next one gets.
        told: its message, in which `{most}` stands for the number.
    """

    def __init__(self, most: int, code: str, told: str) -> None:
        self.most = most
        self._code, self._told = code, told
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    @contextmanager
    def held(self, tenant: str, answers: int = 1) -> Iterator[None]:
        """So many answers are open while this is.

        Raises:
            ApiError: 429, the tenant would have more than it may.
        """
        with self._lock:
            if self._open[tenant] + answers > self.most:
                told = self._told.format(most=self.most)
                raise ApiError(429, told, code=self._code, headers={"Retry-After": "5"})
            self._open[tenant] += answers
        try:
            yield
        finally:
            with self._lock:
                self._open[tenant] -= answers
                if not self._open[tenant]:
                    del self._open[tenant]


async def _until_sent() -> AsyncIterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


#: Left when the answer has been sent, or broke off.
UntilSent = Annotated[ExitStack, Depends(_until_sent)]

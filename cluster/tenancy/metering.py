"""Tokens of served models, counted for their tenants: gathered here, written a few times a second.

So a request does not wait for the database. A process that is killed loses the last second's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from cluster.state import Database
from cluster.state.models import ChatUsage

log = logging.getLogger(__name__)
_DAY_S = 86400
_Key = tuple[str, int, str]  # tenant, day, model


@dataclass
class _Used:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Meter:
    """Counts of one process. Thread-safe; `add` never waits."""

    def __init__(
        self, database: Database, clock: Callable[[], float] = time.time, every_s: float = 0.5
    ) -> None:
        self._database, self._clock, self._every_s = database, clock, every_s
        self._lock = threading.Lock()
        self._used: dict[_Key, _Used] = {}
        self._due: threading.Timer | None = None

    def add(self, tenant_id: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one request that was answered, if only in part."""
        key = tenant_id, int(self._clock() // _DAY_S), model
        with self._lock:
            self._count(key, _Used(1, prompt_tokens, completion_tokens))
            self._schedule()

    def pending(self, tenant_id: str) -> int:
        """The tenant's tokens that are not written yet."""
        with self._lock:
            return sum(
                used.prompt_tokens + used.completion_tokens
                for (tenant, _, _), used in self._used.items()
                if tenant == tenant_id
            )

    def flush(self) -> None:
        """Write what was counted; what cannot be written now is kept and tried again."""
        with self._lock:
            self._due = None
            taken, self._used = self._used, {}
        if not taken:
            return
        try:
            self._write(taken)
        except SQLAlchemyError as error:
            log.warning("usage is not written yet (%s)", type(error).__name__)
            with self._lock:
                for key, used in taken.items():
                    self._count(key, used)
                self._schedule()

    def _count(self, key: _Key, used: _Used) -> None:
        known = self._used.setdefault(key, _Used())
        known.requests += used.requests
        known.prompt_tokens += used.prompt_tokens
        known.completion_tokens += used.completion_tokens

    def _schedule(self) -> None:
        if self._due is None:
            self._due = threading.Timer(self._every_s, self.flush)
            self._due.daemon = True
            self._due.start()

    def _write(self, taken: dict[_Key, _Used]) -> None:
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        with self._database.system() as session:
            for (tenant, day, model), used in sorted(taken.items()):  # sorted: no deadlock
                statement = insert(ChatUsage).values(
                    tenant_id=tenant, day=day, model=model, **vars(used)
                )
                more = {
                    name: getattr(ChatUsage, name) + getattr(statement.excluded, name)
                    for name in vars(used)
                }
                session.execute(
                    statement.on_conflict_do_update(
                        index_elements=["tenant_id", "day", "model"], set_=more
                    )
                )

"""Claims on jobs: a random token with an expiry. Only who still holds it may change the row."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from cluster.controller.phases import STAGES
from cluster.state import Database
from cluster.state.models import Job

_LONGEST_WAIT_S = 300.0


class ClaimLost(Exception):
    """The claim expired and another controller has the job now, or it left its phase."""


def _passed(column: Any, now: float, longest_s: float) -> ColumnElement[bool]:
    """Whether that time is over. Further away than anybody waits, it was another clock's: who set
    ours back would have jobs wait for as long as it had been ahead.
    """
    return or_(column <= now, column > now + longest_s)


class Claims:
    """The claims of one controller.

    Args:
        owner: who, for people who look into the table.
        ttl_s: how long a claim holds without a heartbeat.
    """

    def __init__(
        self, database: Database, owner: str, ttl_s: float, clock: Callable[[], float]
    ) -> None:
        self._database, self._owner, self._ttl_s, self._clock = database, owner, ttl_s, clock

    def take(self, limit: int) -> dict[str, str]:
        """Claim up to `limit` jobs that a stage is due for: their ids, each with its token."""
        now, token = self._clock(), secrets.token_hex(12)
        due = (
            select(Job.id)
            .where(
                Job.phase.in_(STAGES),
                _passed(Job.not_before, now, _LONGEST_WAIT_S),
                or_(
                    Job.lock_expires_at.is_(None),
                    _passed(Job.lock_expires_at, now, max(_LONGEST_WAIT_S, 2 * self._ttl_s)),
                ),
            )
            .order_by(Job.not_before)
            .limit(limit)
            .with_for_update(skip_locked=True, key_share=True)
        )
        with self._database.system() as session:
            ids = list(session.scalars(due))
            if ids:
                session.execute(
                    update(Job)
                    .where(Job.id.in_(ids))
                    .values(
                        lock_token=token,
                        lock_owner=self._owner,
                        lock_expires_at=now + self._ttl_s,
                    )
                )
        return dict.fromkeys(ids, token)

    def renew(self, claims: dict[str, str]) -> None:
        """The heartbeat: all of these hold for another `ttl_s`."""
        with self._database.system() as session:
            for job_id, token in claims.items():
                session.execute(
                    update(Job)
                    .where(Job.id == job_id, Job.lock_token == token)
                    .values(lock_expires_at=self._clock() + self._ttl_s)
                )

    @contextmanager
    def guarded(self, job_id: str, token: str) -> Iterator[tuple[Session, Job]]:
        """A transaction with the job's row locked, for its claim's holder only.

        Raises:
            ClaimLost: the token is not the job's any more; nothing was changed.
        """
        with self._database.system() as session:
            query = select(Job).where(Job.id == job_id, Job.lock_token == token)
            job = session.scalars(query.with_for_update(key_share=True)).one_or_none()
            if job is None:
                raise ClaimLost(job_id)
            yield session, job

    def release(self, job_id: str, token: str, after_s: float) -> None:
        """Give the job back; it is due again after so many seconds.

        What asks to be looked at sooner (a cancellation) is not put off.
        """
        with self._database.system() as session:
            job = session.scalars(
                select(Job)
                .where(Job.id == job_id, Job.lock_token == token)
                .with_for_update(key_share=True)
            ).one_or_none()
            if job is None:
                return
            job.lock_token = job.lock_owner = job.lock_expires_at = None
            if job.wish is None:
                job.not_before = max(job.not_before, self._clock() + after_s)

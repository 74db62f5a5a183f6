"""`Idempotency-Key`: what a POST does, and its answer, are written in one transaction.

So a repeated request finds either both or neither, whenever the server was killed. It does its deed
again and undoes it: new requests are the many, and take no look for an earlier answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Header, Request
from sqlalchemy import Executable, Row, Table, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cluster.api_errors import ApiError
from cluster.state import Database, TenantSession
from cluster.state.models import IdempotentAnswer
from cluster.tenancy.keys import Caller
from safeft.errors import SafeftError

S = TypeVar("S", bound=Session)
Answer = dict[str, Any]
_TABLE = cast(Table, IdempotentAnswer.__table__)
_MINE = (_TABLE.c.tenant_id == bindparam("tenant"), _TABLE.c.key == bindparam("named"))
_EARLIER = select(_TABLE.c.request_sha256, _TABLE.c.answer).where(*_MINE)
_INSERT: dict[str, Executable] = {
    "sqlite": sqlite.insert(_TABLE).on_conflict_do_nothing().returning(_TABLE.c.key),
    "postgresql": postgresql.insert(_TABLE).on_conflict_do_nothing().returning(_TABLE.c.key),
}
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key and body get the same answer, and nothing is done twice.",
    ),
]


@dataclass(frozen=True)
class Repeatable:
    """A POST that may come again. `fingerprint` tells two requests with one key apart."""

    key: str | None
    fingerprint: str


async def _json_request(request: Request, key: Key = None) -> Repeatable:
    return Repeatable(key, fingerprint(request, await request.body()))


JsonPost = Annotated[Repeatable, Depends(_json_request)]


def fingerprint(request: Request, *content: bytes) -> str:
    """SHA-256 over the method, the path, the query and the content."""
    where = f"{request.method} {request.url.path}?{request.url.query}\n"
    found = hashlib.sha256(where.encode())
    for part in content:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()


def once(
    database: Database,
    caller: Caller,
    request: Repeatable,
    now: float,
    effect: Callable[[TenantSession], Answer],
    kept: Callable[[Answer], Answer] = lambda answer: answer,
) -> tuple[Answer, bool]:
    """Do `effect` in a transaction of the caller's tenant.

    All of it is undone where this request was answered before.

    Args:
        effect: changes the transaction's rows and nothing else.
        kept: what of the answer is remembered, where not all of it may be.

    Returns:
        The answer, and whether it was given now.

    Raises:
        ApiError: 409, the key came with another request before.
    """
    return _once(
        database, lambda: database.tenant(caller.tenant_id), caller, request, now, effect, kept
    )


def once_over_all(
    database: Database,
    caller: Caller,
    request: Repeatable,
    now: float,
    effect: Callable[[Session], Answer],
    kept: Callable[[Answer], Answer] = lambda answer: answer,
) -> Answer:
    """`once` for administrators: in a transaction over all tenants' rows. The answer alone."""
    return _once(database, database.system, caller, request, now, effect, kept)[0]


def _once(
    database: Database,
    transaction: Callable[[], AbstractContextManager[S]],
    caller: Caller,
    request: Repeatable,
    now: float,
    effect: Callable[[S], Answer],
    kept: Callable[[Answer], Answer],
) -> tuple[Answer, bool]:
    while True:
        try:
            with transaction() as session:
                answer = effect(session)
                keep(session, caller, [(request, kept(answer))], now)
            return answer, True
        except (Repeated, ApiError, SafeftError, IntegrityError) as error:
            # Undone. What cannot be done twice fails where it is repeated, so ask in any case.
            if request.key is not None:
                earlier = _earlier(database, caller, request.key)
                if earlier is not None:
                    return _same(request, earlier), False
            if not isinstance(error, Repeated):
                raise
            # else the earlier answer was old, and was removed in between


class Repeated(Exception):
    """A key has an answer already."""


def keep(
    session: Session,
    caller: Caller,
    answers: Sequence[tuple[Repeatable, dict[str, Any]]],
    now: float,
) -> None:
    """Keep the answers; waits for requests with their keys that are under way.

    Last in their transaction: a request that is new, as nearly all are, takes this one statement.

    Raises:
        Repeated: one of the keys has an answer already.
    """
    session.flush()
    rows = [
        {
            "tenant_id": caller.tenant_id,
            "key": request.key,
            "request_sha256": request.fingerprint,
            "answer": answer,
            "created_at": now,
        }
        for request, answer in answers
        if request.key is not None
    ]
    if not rows:
        return
    # The connection itself: this is in every POST, and the session would take longer.
    connection = session.connection()
    kept = connection.execute(_INSERT[connection.dialect.name], rows).all()
    if len(kept) < len(rows):
        raise Repeated


def _earlier(database: Database, caller: Caller, key: str) -> Row[*tuple[Any, ...]] | None:
    found = database.rows(_EARLIER, {"tenant": caller.tenant_id, "named": key})
    database.flush()  # another request's commit, which may still be on its way to the disk
    return found[0] if found else None


def _same(request: Repeatable, earlier: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    if earlier.request_sha256 != request.fingerprint:
        raise ApiError(
            409,
            "This Idempotency-Key came with another request before; use a new key",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    answer: dict[str, Any] = earlier.answer
    return answer

"""`Idempotency-Key`: what a POST does, and its answer, are written in one transaction.

So a repeated request finds either both or neither, whenever the server was killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Header, Request
from sqlalchemy import Executable, Table, bindparam, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cluster.api_errors import ApiError
from cluster.state.models import IdempotentAnswer
from cluster.tenancy.keys import Caller

S = TypeVar("S", bound=Session)
_TABLE = cast(Table, IdempotentAnswer.__table__)
_MINE = (_TABLE.c.tenant_id == bindparam("tenant"), _TABLE.c.key == bindparam("named"))
_EARLIER = select(_TABLE.c.request_sha256, _TABLE.c.answer).where(*_MINE)
_INSERT: dict[str, Executable] = {
    "sqlite": sqlite.insert(_TABLE).on_conflict_do_nothing().returning(_TABLE.c.key),
    "postgresql": postgresql.insert(_TABLE).on_conflict_do_nothing().returning(_TABLE.c.key),
}
_ANSWERED = update(_TABLE).where(*_MINE)
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
    transaction: Callable[[], AbstractContextManager[S]],
    caller: Caller,
    request: Repeatable,
    now: float,
    effect: Callable[[S], dict[str, Any]],
    kept: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer,
) -> tuple[dict[str, Any], bool]:
    """Run `effect` in a transaction unless this request was answered before.

    Args:
        kept: what of the answer is remembered, where not all of it may be.

    Returns:
        The answer, and whether it was given now.

    Raises:
        ApiError: 409, the key came with another request before.
    """
    with transaction() as session:
        if request.key is None:
            return effect(session), True
        # The connection itself: this is in every POST, and the session would take longer.
        rows = session.connection()
        which = {"tenant": caller.tenant_id, "named": request.key}
        row = {
            "tenant_id": caller.tenant_id,
            "key": request.key,
            "request_sha256": request.fingerprint,
            "answer": {},
            "created_at": now,
        }
        # The insertion waits for a request with this key that is under way.
        while rows.execute(_INSERT[rows.dialect.name], row).one_or_none() is None:
            earlier = rows.execute(_EARLIER, which).one_or_none()
            if earlier is None:
                continue  # it was old, and removed in between
            if earlier.request_sha256 != request.fingerprint:
                raise ApiError(
                    409,
                    "This Idempotency-Key came with another request before; use a new key",
                    code="idempotency_key_reused",
                    param="Idempotency-Key",
                )
            return earlier.answer, False
        answer = effect(session)
        rows.execute(_ANSWERED, {**which, "answer": kept(answer)})
        return answer, True

"""The audit log: a chain in which each link holds the hash of the one before it.

A changed, removed or inserted link is found by reading the chain. One cut off at its end is found
by whoever kept the last hash (`safeft audit verify --head`): write it down elsewhere, now and then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from cluster.state.models import AuditEntry, Lock
from safeft.errors import SafeftError

ORIGIN = "0" * 64
_LOCK = select(Lock.name).where(Lock.name == "audit").with_for_update(key_share=True)
_LAST = select(AuditEntry.seq, AuditEntry.sha256).order_by(AuditEntry.seq.desc()).limit(1)
_FIELDS = ("at", "actor", "tenant_id", "action", "object_id", "before", "after", "reason")


class AuditBroken(SafeftError):
    """The chain is broken; the message names the first link that is wrong."""


class Link(BaseModel):
    """One entry, as it is stored and as it is handed out.

    Attributes:
        before, after: canonical JSON of what was changed.
        previous: the hash of the entry before this one.
        sha256: over all the other fields.
    """

    model_config = ConfigDict(extra="forbid", from_attributes=True)
    seq: int
    at: float
    actor: str
    tenant_id: str | None
    action: str
    object_id: str
    before: str | None
    after: str | None
    reason: str | None
    previous: str
    sha256: str

    def hash(self) -> str:
        """What `sha256` must be."""
        fields = [self.seq, *(getattr(self, name) for name in _FIELDS), self.previous]
        text = json.dumps(fields, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


class Chain(BaseModel):
    """A chain that holds: how long it is, and its last hash."""

    entries: int
    head: str


@dataclass(frozen=True)
class Deed:
    """What was done, by whom, to what. `before` and `after` are JSON, as is what was changed."""

    at: float
    actor: str
    tenant_id: str | None
    action: str
    object_id: str
    before: Any = None
    after: Any = None
    reason: str | None = None


def record(
    session: Session,
    *,
    at: float,
    actor: str,
    tenant_id: str | None,
    action: str,
    object_id: str,
    before: Any = None,
    after: Any = None,
    reason: str | None = None,
) -> None:
    """Append an entry in the caller's transaction: see `record_all`."""
    deed = Deed(at, actor, tenant_id, action, object_id, before, after, reason)
    record_all(session, [deed])


def record_all(session: Session, deeds: Sequence[Deed]) -> None:
    """Append entries in the caller's transaction: deeds and entries stand or fall together.

    Call it last: the chain is locked from here to the end of the transaction.
    """
    session.flush()
    if not deeds:
        return
    # The connection itself, because a tenant's session does not reach this table.
    connection = session.connection()
    if connection.dialect.name != "sqlite":  # which has one writer anyway
        connection.execute(_LOCK)
    last = connection.execute(_LAST).one_or_none()
    seq, previous = (last.seq, last.sha256) if last else (0, ORIGIN)
    links: list[dict[str, Any]] = []
    for deed in deeds:
        fields = {**vars(deed), "before": _canonical(deed.before), "after": _canonical(deed.after)}
        link = Link(seq=seq + 1, previous=previous, sha256="", **fields)
        link.sha256 = link.hash()
        seq, previous = link.seq, link.sha256
        links.append(link.model_dump())
    connection.execute(insert(AuditEntry), links)


def entries(session: Session, after: int = 0, limit: int | None = None) -> Iterator[Link]:
    """The chain from the link after number `after`, in order."""
    query = select(AuditEntry).where(AuditEntry.seq > after).order_by(AuditEntry.seq).limit(limit)
    for entry in session.scalars(query.execution_options(yield_per=500)):
        yield Link.model_validate(entry)


def verify(links: Iterable[Link], head: str | None = None) -> Chain:
    """Follow the chain from its beginning.

    Args:
        head: a hash that was the last one at some time; the chain must still contain it.

    Raises:
        AuditBroken: with the number of the first link that is wrong, and what is wrong with it.
    """
    seq, previous, seen = 0, ORIGIN, head in (None, ORIGIN)
    for link in links:
        if link.seq != seq + 1:
            raise AuditBroken(f"entry {seq + 1} is missing: entry {seq} is followed by {link.seq}")
        if link.hash() != link.sha256:
            raise AuditBroken(f"entry {link.seq} was changed: its content has another hash")
        if link.previous != previous:
            raise AuditBroken(f"entry {link.seq} does not follow entry {seq}: one was replaced")
        seq, previous = link.seq, link.sha256
        seen = seen or previous == head
    if not seen:
        raise AuditBroken(
            f"the chain ends at entry {seq} and never was at the hash {str(head)[:16]}: entries at "
            "its end were removed or replaced"
        )
    return Chain(entries=seq, head=previous)


def _canonical(value: Any) -> str | None:
    if value is None:
        return None
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))

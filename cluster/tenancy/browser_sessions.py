"""Browser sessions: a key, shown once at the login, against a token that ends soon.

The token is random and only its hash is stored. A session is worth what its key is worth at the
moment of each request: revoked, expired, suspended, and it is over.
"""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import delete, select

from cluster.state import Database
from cluster.state.models import ApiKey, BrowserSession, Tenant
from cluster.tenancy.audit import record
from cluster.tenancy.keys import CALLER, Caller, authenticate, caller_of

SESSION_S = 4 * 3600.0  # from the login, however much it is used


def open_session(database: Database, shown: str, now: float) -> str | None:
    """A new session's token for who shows this key; None where the key is worth nothing."""
    caller = authenticate(database, shown, now)
    if caller is None:
        return None
    token = secrets.token_urlsafe(32)
    with database.system() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.expires_at <= now))
        session.add(
            BrowserSession(
                token_sha256=_hash(token),
                tenant_id=caller.tenant_id,
                key_id=caller.key_id,
                created_at=now,
                expires_at=now + SESSION_S,
            )
        )
        record(
            session,
            at=now,
            actor=caller.actor,
            tenant_id=caller.tenant_id,
            action="session.open",
            object_id=caller.key_id,
        )
    return token


def session_caller(database: Database, token: str, now: float) -> Caller | None:
    """Whose session this is; None where it has ended, or its key has."""
    with database.system_read() as session:
        found = session.execute(
            select(*CALLER)
            .join(BrowserSession, BrowserSession.key_id == ApiKey.id)
            .join(Tenant, Tenant.id == ApiKey.tenant_id)
            .where(BrowserSession.token_sha256 == _hash(token), BrowserSession.expires_at > now)
        ).one_or_none()
    return None if found is None else caller_of(found, now)


def close_session(database: Database, token: str) -> None:
    """End the session; one that is not there is fine."""
    with database.system() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == _hash(token)))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

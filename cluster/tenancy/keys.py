"""API keys: ``sf-<prefix>-<secret>``. The secret is shown once; its hash is all that is kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import Row, bindparam, select
from sqlalchemy.orm import Session

from cluster.state import Database
from cluster.state.ids import new_id
from cluster.state.models import ApiKey, Tenant
from safeft.errors import InputError

Role = Literal["tenant", "admin"]
Scope = Literal[
    "files:read",
    "files:write",
    "jobs:read",
    "jobs:write",
    "models:read",
    "models:write",
    "safety:read",
    "chat",
]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_SHOWN = re.compile(r"sf-([0-9a-f]{12})-([0-9a-f]{64})")
#: What `caller_of` reads: columns, because it is asked at every request, and objects take longer.
CALLER = (
    ApiKey.prefix,
    ApiKey.id,
    ApiKey.tenant_id,
    ApiKey.secret_sha256,
    ApiKey.role,
    ApiKey.scopes,
    ApiKey.expires_at,
    ApiKey.revoked_at,
    Tenant.name,
    Tenant.suspended_at,
    Tenant.requests_per_second,
)
_KEYS = (
    select(*CALLER)
    .join(Tenant, Tenant.id == ApiKey.tenant_id)
    .where(ApiKey.prefix.in_(bindparam("prefixes", expanding=True)))
)
_NOBODY = hashlib.sha256(b"no key has this secret").hexdigest()


@dataclass(frozen=True)
class Caller:
    """Who a request comes from.

    Attributes:
        requests_per_second: the tenant's limit over all of its keys.
    """

    tenant_id: str
    tenant_name: str
    key_id: str
    role: Role
    scopes: frozenset[str]
    requests_per_second: float

    @property
    def actor(self) -> str:
        """As the audit log names it."""
        return f"key:{self.key_id}"

    def may(self, scope: Scope) -> bool:
        """Whether the key was given this scope."""
        return scope in self.scopes


def authenticate(database: Database, shown: str, now: float) -> Caller | None:
    """The caller with this key, or None: see `authenticate_all`."""
    return authenticate_all(database, [shown], now)[0]


def authenticate_all(database: Database, shown: Sequence[str], now: float) -> list[Caller | None]:
    """The caller with each key, or None: unknown, wrong, expired, revoked and suspended alike.

    Nothing is remembered between calls, so that a revoked key is worth nothing at once.
    """
    keys = [_SHOWN.fullmatch(one) for one in shown]
    prefixes = sorted({key[1] for key in keys if key is not None})
    rows = database.rows(_KEYS, {"prefixes": prefixes}) if prefixes else ()
    found = {row.prefix: row for row in rows}
    return [None if key is None else _caller(found.get(key[1]), key[2], now) for key in keys]


def _caller(found: Row[*tuple[Any, ...]] | None, secret: str, now: float) -> Caller | None:
    # Compared in any case, so that the time says nothing about which prefixes exist.
    good = hmac.compare_digest(_hash(secret), found.secret_sha256 if found else _NOBODY)
    if found is None or not good:
        return None
    return caller_of(found, now)


def caller_of(found: Row[*tuple[Any, ...]], now: float) -> Caller | None:
    """Who calls, from the `CALLER` columns; None: the key has ended, or its tenant is suspended."""
    if found.revoked_at is not None or found.suspended_at is not None:
        return None
    if found.expires_at is not None and found.expires_at <= now:
        return None
    return Caller(
        tenant_id=found.tenant_id,
        tenant_name=found.name,
        key_id=found.id,
        role=_role(found.role),
        scopes=frozenset(found.scopes),
        requests_per_second=found.requests_per_second,
    )


def create_key(
    session: Session,
    tenant_id: str,
    *,
    name: str,
    now: float,
    role: Role = "tenant",
    scopes: Sequence[str] = SCOPES,
    expires_at: float | None = None,
) -> tuple[ApiKey, str]:
    """A new key's row, and the key itself: the only time it is seen.

    The secret has 256 random bits, so a plain SHA-256 of it cannot be searched.

    Raises:
        InputError: a scope that does not exist, or none at all.
    """
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise InputError(f"scopes: no scope {unknown[0]!r}; choose from {', '.join(SCOPES)}")
    if not scopes:
        raise InputError("scopes: a key needs at least one")
    prefix, secret = secrets.token_hex(6), secrets.token_hex(32)
    key = ApiKey(
        id=new_id("key"),
        tenant_id=tenant_id,
        name=name,
        prefix=prefix,
        secret_sha256=_hash(secret),
        role=role,
        scopes=sorted(set(scopes)),
        created_at=now,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    return key, f"sf-{prefix}-{secret}"


def rotate_key(
    session: Session, key: ApiKey, *, now: float, overlap_s: float = 0.0
) -> tuple[ApiKey, str]:
    """A new key like `key`, which ends after `overlap_s` seconds: by default, now.

    Raises:
        InputError: `key` is not valid any more.
    """
    if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise InputError("the key has ended; create a new one")
    made = create_key(
        session,
        key.tenant_id,
        name=key.name,
        now=now,
        role=_role(key.role),
        scopes=key.scopes,
        expires_at=key.expires_at,
    )
    if overlap_s > 0:
        key.expires_at = min(now + overlap_s, key.expires_at or float("inf"))
    else:
        key.revoked_at = now
    return made


def _role(stored: str) -> Role:
    return "admin" if stored == "admin" else "tenant"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

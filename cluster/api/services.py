"""What the routes need, made once and handed to each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import httpx
from fastapi import Depends, Request

from cluster.api.lines import Lines
from cluster.api.open_answers import OpenAnswers
from cluster.api.pools import pool_client
from cluster.api.submissions import Submissions
from cluster.artifacts import ArtifactStore, open_store
from cluster.provenance import PublicKey, SigningKey
from cluster.settings import Settings
from cluster.state import Database
from cluster.tenancy.keys import Caller, authenticate_all
from cluster.tenancy.metering import Meter
from cluster.tenancy.quotas import RateLimiter

_STREAMS = "{most} event streams are open; close one, or ask without `stream`"
_CHATS = "You may have {most} answers of chat at a time; each of a request's `n` is one"


def _event_streams() -> OpenAnswers:
    return OpenAnswers(50, "too_many_streams", _STREAMS)


@dataclass(frozen=True)
class Services:
    """State, store and settings of one control plane."""

    settings: Settings
    database: Database
    store: ArtifactStore
    public_key: PublicKey
    clock: Callable[[], float] = time.time
    rates: RateLimiter = field(default_factory=RateLimiter)
    event_poll_s: float = 0.5
    upload_idle_s: float = 60.0
    streams: OpenAnswers = field(default_factory=_event_streams)
    chats: OpenAnswers = field(init=False)
    pools: httpx.AsyncClient = field(default_factory=pool_client)
    meter: Meter = field(init=False)
    submissions: Submissions = field(init=False)
    callers: Lines[str, Caller | None] = field(init=False)

    def __post_init__(self) -> None:
        chats = OpenAnswers(self.settings.max_chat_answers, "too_many_answers", _CHATS)
        object.__setattr__(self, "chats", chats)
        object.__setattr__(self, "meter", Meter(self.database, self.clock))
        object.__setattr__(self, "callers", Lines(self._callers))
        object.__setattr__(self, "submissions", Submissions(self.settings, self.database))

    def _callers(self, shown: Sequence[str]) -> list[Caller | None]:
        return authenticate_all(self.database, shown, self.clock())

    @classmethod
    def open(cls, settings: Settings) -> Services:
        """Bring the database to this version's schema and open everything.

        Raises:
            SafeftError: something is not there; the message says what.
        """
        settings.make_home()
        database = Database(settings.database_url)
        database.migrate()
        return cls(
            settings=settings,
            database=database,
            store=open_store(settings.artifacts_url),
            public_key=SigningKey.load_or_create(settings.signing_key).public,
        )


async def _services(request: Request) -> Services:  # not a thread's work
    services: Services = request.app.state.services
    return services


With = Annotated[Services, Depends(_services)]

"""An API server in a thread, over real HTTP, and clients for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import uvicorn
from fastapi import FastAPI

from cluster.api import Services, create_app
from cluster.artifacts import open_store
from cluster.provenance import SigningKey
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from cluster.tenancy.keys import create_key
from tests.control.rows import add_tenant


@contextlib.contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """The server's address, while it runs."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    server.force_exit = True  # a stream that a test left open does not hold it up
    thread.join()


class Api:
    """A running API with a tenant, and what tests look into behind it."""

    def __init__(self, url: str, services: Services) -> None:
        self.url, self.services, self.database = url, services, services.database

    def key(self, tenant: str, **options: Any) -> str:
        with self.database.system() as session:
            return create_key(session, tenant, name="test", now=1.0, **options)[1]

    def tenant(self, tenant: str, **fields: Any) -> openai.OpenAI:
        """A new tenant's client."""
        add_tenant(self.database, tenant, **fields)
        return self.client(self.key(tenant))

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0)


@contextlib.contextmanager
def running_api(database: Database, home: Path, **options: Any) -> Iterator[Api]:
    settings = options.pop("settings", None) or Settings(
        home=home,
        base_models={"tiny": BaseModelOffer(source=str(home / "tiny"), max_tokens=256)},
        max_upload_bytes=options.pop("max_upload_bytes", 30 << 20),
        compute_slots=2,
    )
    services = Services(
        settings=settings,
        database=database,
        store=open_store(settings.artifacts_url),
        public_key=SigningKey.load_or_create(settings.signing_key).public,
        event_poll_s=0.02,
        **options,
    )
    with serve(create_app(services)) as url:
        yield Api(url, services)

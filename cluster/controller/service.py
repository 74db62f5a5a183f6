"""One controller as a process: what `safeft controller` runs."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from typing import TYPE_CHECKING

from cluster.artifacts import open_store
from cluster.controller.controller import Controller, Options
from cluster.controller.registrar import Registrar
from cluster.exporter import EXPORTER, NAMESPACE, Exporter, push_for_ever
from cluster.metrics import Recorder, Snapshot
from cluster.provenance import SigningKey
from cluster.settings import Settings
from cluster.state import Database
from jobs.runtime import embedded_ray

if TYPE_CHECKING:
    from cluster.controller.actors import Host


def run_controller(
    settings: Settings,
    address: str | None,
    stop: threading.Event,
    options: Options | None = None,
    *,
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
    host: type[Host] | None = None,
) -> None:
    """Move jobs on until `stop` is set, or Ray is gone: then the process ends.

    Args:
        address: of a Ray cluster, where stages outlive this process; None: a Ray of its own, whose
            stages end with it and are taken up again, from their checkpoints, by the next one.
        metrics_port: of a page for Prometheus; None: the page of the serving pool in the same Ray,
            if one runs there, has this controller's numbers too.
        host: what does the stages in their actors.

    Raises:
        SafeftError: the database has another schema, no Ray answers, or the port is taken.
    """
    # Ray takes seconds to import; nothing else here needs it.
    from cluster.controller.actors import ActorRunner
    from cluster.controller.ray_watch import watched_ray

    settings.make_home()
    database = Database(settings.database_url)
    database.require_current()
    store = open_store(settings.artifacts_url)
    public_key = SigningKey.load_or_create(settings.signing_key).public
    registrar = Registrar(settings, database, public_key)
    recorder = Recorder()
    source = f"controller-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    if metrics_port is not None:
        page = Exporter()
        page.include(source, recorder)
        page.listen(metrics_host, metrics_port)
    with embedded_ray(address), watched_ray():
        if metrics_port is None:
            push_for_ever(recorder, source, push_to_pool)
        controller = Controller(
            settings, database, store, ActorRunner(host), options=options, recorder=recorder
        )
        try:
            threading.Thread(target=registrar.run, args=[stop], daemon=True).start()
            controller.run(stop)
        finally:
            database.close()


def push_to_pool(source: str, snapshot: Snapshot) -> None:
    """Give a process's numbers to the exporter of the serving pool in this Ray, if there is one."""
    import ray

    with contextlib.suppress(ValueError):  # nobody serves here
        ray.get_actor(EXPORTER, namespace=NAMESPACE).push.remote(source, snapshot)

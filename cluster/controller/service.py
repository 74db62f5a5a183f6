"""One controller as a process: what `safeft controller` runs."""

from __future__ import annotations

import threading

from cluster.artifacts import open_store
from cluster.controller.apply import Rules
from cluster.controller.controller import Controller, Options
from cluster.settings import Settings
from cluster.state import Database
from jobs.runtime import embedded_ray


def run_controller(
    settings: Settings, address: str | None, stop: threading.Event, options: Options | None = None
) -> None:
    """Move jobs on until `stop` is set.

    Args:
        address: of a Ray cluster, where stages outlive this process; None: a Ray of its own, whose
            stages end with it and are taken up again, from their checkpoints, by the next one.

    Raises:
        SafeftError: the database has another schema, or no Ray answers.
    """
    # Ray and the jobs take seconds to import; nothing else here needs them.
    from cluster.controller.actors import ActorRunner
    from cluster.controller.work import WORK

    database = Database(settings.database_url)
    database.require_current()
    options = options or Options(rules=Rules(restores="restoring" in WORK))
    store = open_store(settings.artifacts_url)
    with embedded_ray(address):
        try:
            Controller(settings, database, store, ActorRunner(), options=options).run(stop)
        finally:
            database.close()

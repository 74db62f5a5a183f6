"""A controller as a process of its own, to be killed.

``python -m tests.control.controllers SETTINGS.json ray HOST:PORT PORT`` runs stages on Ray, with a
page for Prometheus,
``... SETTINGS.json files DIRECTORY`` as files.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from cluster.artifacts import open_store
from cluster.controller.controller import Controller, Options
from cluster.settings import Settings
from cluster.state import Database
from tests.control.stages import FileRunner

OPTIONS = Options(tick_s=0.05, poll_s=0.1, claim_ttl_s=1.0, sweep_s=1.0)


def main(settings_file: str, kind: str, where: str, metrics_port: str = "") -> None:
    settings = Settings.model_validate_json(Path(settings_file).read_bytes())
    stop = threading.Event()
    if kind == "ray":
        from cluster.controller.service import run_controller

        run_controller(settings, where, stop, OPTIONS, metrics_port=int(metrics_port))
        return
    database = Database(settings.database_url)
    store = open_store(settings.artifacts_url)
    runner = FileRunner(Path(where), seconds=0.1)
    Controller(settings, database, store, runner, options=OPTIONS).run(stop)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What is killed, each a process of its own.

``python -m benchmarks.control_kills.processes api SETTINGS.json PORT``
``python -m benchmarks.control_kills.processes controller SETTINGS.json HOST:PORT``
``python -m benchmarks.control_kills.processes actors SETTINGS.json HOST:PORT`` prints who is there.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path

from cluster.settings import Settings

CLAIM_TTL_S = 5.0


def api(settings: Settings, port: str) -> None:
    import uvicorn

    from cluster.api import Services, create_app

    app = create_app(Services.open(settings))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


def controller(settings: Settings, address: str) -> None:
    from benchmarks.control_kills.stages import TinyHost
    from cluster.controller.apply import Rules
    from cluster.controller.controller import Options
    from cluster.controller.service import run_controller

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = Options(
        poll_s=0.5,
        claim_ttl_s=CLAIM_TTL_S,
        sweep_s=5.0,
        # So many kills in minutes would exhaust a job's five attempts, which is as it should be.
        rules=Rules(max_faults=1000),
    )
    run_controller(settings, address, threading.Event(), options, host=TinyHost)


def actors(settings: Settings, address: str) -> None:
    from cluster.controller.actors import ActorRunner
    from jobs.runtime import embedded_ray

    with embedded_ray(address):
        print(json.dumps(sorted(ActorRunner().names())))


if __name__ == "__main__":
    kind, settings_file, where = sys.argv[1:]
    settings = Settings.model_validate_json(Path(settings_file).read_bytes())
    {"api": api, "controller": controller, "actors": actors}[kind](settings, where)

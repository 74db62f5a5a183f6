"""A real run to look at: jobs on Ray, a pool that answers and is probed, one model that slips."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.exporter import Exporter
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from safeft.profile import SafetyProfile
from tests.control.server import Api, running_api
from tests.control.test_ray_jobs import HOST, ROOT, copy_profile, refusing_tiny, start_controller
from tests.dashboard_world import Pool
from tests.tiny import save_tiny
from tests.tinyparts import write_parts
from tests.tinyprofile import write_profile

TENANTS = ("acme", "globex")
GOOD, BAD = "ft:tiny:acme:helpdesk:3fa9c2d41b07", "ft:tiny:acme:legal:77b1e0a95c3d"
OTHER = "ft:tiny:globex:triage:e2d40c6a8f19"
ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(96)]


@contextmanager
def jobs(home: Path) -> Iterator[tuple[Callable[[], bool], str]]:
    """Two tenants' jobs on Ray: whether they all ended, and the address of the controller's page.

    One base model is offered under a second name with a threshold that no row keeps, so that its
    datasets are rejected.
    """
    model = refusing_tiny(home / "tiny")
    profile = write_profile(model, save_tiny(home / "unaligned", seed=1), threshold=100.0)
    _for_cwac(profile, model, home)
    strict = copy_profile(profile, home / "strict", threshold=-100.0)
    settings = Settings(
        database=f"sqlite:///{home / 'state.db'}",
        home=home / "home",
        base_models={
            "tiny": BaseModelOffer(source=str(model), profile=profile.root, max_tokens=128),
            "strict": BaseModelOffer(source=str(model), profile=strict, max_tokens=128),
        },
        compute_slots=1,
        intake_slots=1,
    )
    (home / "settings.json").write_text(settings.model_dump_json())
    database = Database(settings.database_url)
    database.migrate()
    with _ray(home) as address, running_api(database, home / "home", settings=settings) as api:
        controller = start_controller(home, address)
        try:
            clients = [api.tenant(tenant) for tenant in TENANTS]
            submitted = [_submit(client, base) for base in ("tiny", "strict") for client in clients]
            port = (home / "metrics-port").read_text()

            def ended() -> bool:
                assert controller.poll() is None, (home / "controller.log").read_text()[-3000:]
                return all(_ended(api, job) for job in submitted)

            yield ended, f"127.0.0.1:{port}"
        finally:
            controller.terminate()
            controller.wait()
    database.close()


@contextmanager
def serving(home: Path) -> Iterator[str]:
    """A pool under load, for as long as the block lasts: the address of its page.

    Its second model stops refusing after a minute, is quarantined by its probes, and is released
    by hand two minutes later, when it refuses again.
    """
    home.mkdir()
    pool = Pool(save_tiny(home / "tiny"), home, probe_every_s=20.0)
    pool.add(GOOD, 1)
    bad = pool.add(BAD, 2)
    pool.add(OTHER, 3)
    pool.model.refuses |= {bad: 0.97, None: 0.98}
    page = Exporter()
    page.include("pool", pool.stack.recorder)
    port = page.listen("127.0.0.1", 0)
    stop = threading.Event()
    threads = [threading.Thread(target=_talk, args=(pool, stop, n)) for n in range(3)]
    threads += [
        threading.Thread(target=_crowd, args=(pool, stop)),
        threading.Thread(target=_slip, args=(pool, stop, bad)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        pool.close()


def _talk(pool: Pool, stop: threading.Event, number: int) -> None:
    models = (GOOD, BAD, OTHER, "base", GOOD, OTHER)
    asked = number
    while not stop.wait(0.4):
        asked += 1
        model = "no-such-model" if asked % 40 == 0 else models[asked % len(models)]
        pool.ask(model, tokens=4 + 7 * (asked % 5), stream=asked % 2 == 0)


def _crowd(pool: Pool, stop: threading.Event) -> None:
    """Now and then more than the queue holds."""
    while not stop.wait(75):
        crowd = [
            threading.Thread(target=pool.ask, args=(OTHER,), kwargs={"tokens": 24})
            for _ in range(20)
        ]
        for one in crowd:
            one.start()
        for one in crowd:
            one.join()


def _slip(pool: Pool, stop: threading.Event, weights: str) -> None:
    if stop.wait(60):
        return
    pool.model.refuses[weights] = 0.3
    while pool.states()[BAD] != "quarantined":
        if stop.wait(1):
            return
    if stop.wait(120):
        return
    pool.model.refuses[weights] = 0.97
    decide = pool.stack.keeper.decide
    pool.stack.do(decide("release", BAD, "benchmark", "it refuses again"))


def _submit(client: Any, base: str) -> str:
    content = "\n".join(map(json.dumps, ROWS)).encode()
    file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    method: Any = {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {"n_epochs": 5, "learning_rate_multiplier": 0.01, "batch_size": 4},
            "constraints": ["asft", "cwac"],
            "safety_rows": 0,  # the tiny model has no answers of its own
            "answer_rows": 0,
        },
    }
    job = client.fine_tuning.jobs.create(model=base, training_file=file.id, method=method)
    return str(job.id)


def _ended(api: Api, job: str) -> bool:
    from cluster.state.models import Job

    with api.database.system_read() as session:
        return session.get_one(Job, job).finished_at is not None


def _for_cwac(profile: SafetyProfile, model: Path, home: Path) -> None:
    """The parts of the profile that CWAC reads."""
    write_parts(model, home / "unaligned", home / "parts")
    for name, part in (("inputs", "harmful-inputs"), ("benign", "benign-inputs")):
        shutil.copytree(home / "parts" / name, profile.root / part)
        profile.write_record(profile.root / part, {})


@contextmanager
def _ray(home: Path) -> Iterator[str]:
    """A Ray of its own, in a process that stops it when it ends."""
    with (home / "ray.log").open("wb") as log:
        host = subprocess.Popen(
            [sys.executable, "-c", HOST.replace("600", "3600")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert host.stdout is not None
    address = host.stdout.readline().decode().strip()
    assert address, "Ray did not start: " + (home / "ray.log").read_text()[-2000:]
    try:
        yield address
    finally:
        host.terminate()  # embedded_ray then stops all that it started
        host.wait(60)
        host.stdout.close()


def wait_for(what: Callable[[], bool], within_s: float) -> None:
    """Until it is so. TimeoutError after `within_s`."""
    end = time.monotonic() + within_s
    while not what():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(1)

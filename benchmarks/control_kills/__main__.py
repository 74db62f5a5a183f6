"""Kill the control plane again and again while tenants use it: is anything lost, doubled or left?

    python -m benchmarks.control_kills [--kills 200] [--jobs 60] [--seed 0] [--json FILE]

Two controllers and two API processes on SQLite, and a Ray of its own (`ray start`), all supervised:
whatever ends is started again. SIGKILL at random moments hits a controller, an API process, a
stage's Ray worker, Ray's raylet or its GCS. Stages are tiny: no model, but the store, the working
directory and checkpoints are real. Exit code 1 if anything is wrong at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from benchmarks.control_kills.judge import await_settled, begun_twice, judge
from benchmarks.control_kills.plane import RAY_CORES, Plane, kill, wait_until
from benchmarks.control_kills.stages import log_of
from benchmarks.control_kills.tenants import Ledger, Tenant
from cluster.controller.phases import STAGES
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from cluster.state.models import Job, Stage
from cluster.tenancy.keys import create_key
from tests.control.rows import add_tenant

TENANTS, CONTROLLERS, APIS, SLOTS = 3, 2, 2, 4
#: Whom a kill hits, out of so many. Ray itself takes everything with it, so it is hit less often.
VICTIMS = {"controller": 8, "api": 7, "worker": 8, "raylet": 1, "gcs_server": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=60, help="at least; more while kills are left")
    parser.add_argument("--every", type=float, default=2.0, help="least mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--home", type=Path, help="keep the state and the logs here")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end what was started
    with tempfile.TemporaryDirectory(prefix="safeft-kills-") as directory:
        home = Path(directory) if args.home is None else args.home.absolute()
        found = run(home, args.kills, args.jobs, args.every, args.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 1 if any(found["wrong"].values()) else 0


def run(home: Path, kills: int, jobs: int, every: float, seed: int) -> dict[str, Any]:
    """The whole of it; what was done, and what is wrong."""
    settings = Settings(
        home=home,
        base_models={"tiny": BaseModelOffer(source="tiny")},
        compute_slots=SLOTS,
        intake_slots=SLOTS,
    )
    database = Database(settings.database_url)
    database.migrate()
    keys = {}
    for number in range(TENANTS):
        name = add_tenant(database, f"ten-{number}", weight=1.0 + number)
        with database.system() as session:
            keys[name] = create_key(session, name, name="kills", now=1.0)[1]
    began = time.monotonic()
    ledger, hits, phases = Ledger(), Counter[str](), Counter[str]()
    with Plane(settings, CONTROLLERS, APIS) as plane:
        tenants = {
            name: Tenant(name, key, plane.urls, ledger, seed + number)
            for number, (name, key) in enumerate(keys.items())
        }
        over = threading.Event()
        with ThreadPoolExecutor(TENANTS) as pool:
            share = -(-jobs // TENANTS)
            use = [pool.submit(_use, tenant, share, over) for tenant in tenants.values()]
            try:
                _kill(plane, database, random.Random(seed), kills, every, hits, phases)
            finally:
                over.set()
            for one in use:
                one.result()
        await_settled(database, 900)
        orphans = _orphans(plane)
        wrong = judge(settings, database, ledger, tenants)
        wrong["orphan_actors"] = orphans
        ended = {name: service.starts - 1 for name, service in plane.services.items()}
        leftovers = plane.ray_leftovers
    database.close()
    return {
        "kills": hits.total(),
        "killed": dict(hits),
        "phases_under_a_kill": dict(phases),
        "jobs": Counter(ledger.jobs.values()),
        "files": len(ledger.files),
        "requests": len(ledger.answers),
        "requests_repeated": ledger.repeats,
        "restarts": ended,
        "ray_processes_that_outlived_it": leftovers,
        "stages_begun_twice_by_one_name": len(begun_twice(home)),
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in ("ray", "sqlalchemy", "fastapi")},
        "wrong": wrong,
    }


def _use(tenant: Tenant, jobs: int, over: threading.Event) -> None:
    """Upload, submit, cancel, pause and resume, until there were enough jobs and kills."""
    with ThreadPoolExecutor(4) as pool:
        done, meddling = 0, []
        while done < jobs or not over.is_set():
            job = tenant.submit(tenant.upload())
            meddling.append(pool.submit(tenant.meddle, job, over))
            done += 1
            while not over.is_set() and _open(tenant) >= 6:
                over.wait(0.5)
        for one in meddling:
            one.exception()  # it is in the ledger


def _open(tenant: Tenant) -> int:
    """Jobs of the tenant that have not ended."""
    rows = tenant.get("/v1/fine_tuning/jobs?limit=100").json()["data"]
    return sum(row["finished_at"] is None for row in rows)


def _kill(
    plane: Plane,
    database: Database,
    draw: random.Random,
    kills: int,
    every: float,
    hits: Counter[str],
    phases: Counter[str],
) -> None:
    """So many kills, at random moments, each of one process while some stage is under way."""
    wait_until(lambda: _phases(database), 180, "a first stage")
    done = _finished(database)
    names, shares = list(VICTIMS), list(VICTIMS.values())
    deadline = time.monotonic() + 60 + 40 * every * kills
    while hits.total() < kills:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {hits} kills in the time for {kills}")
        time.sleep(draw.expovariate(1 / every))
        # Kills faster than anything gets done would all fall on first stages.
        with contextlib.suppress(TimeoutError):
            wait_until(lambda before=done: _finished(database) > before, 15 * every, "a stage")
        done, running = _finished(database), _phases(database)
        victim = draw.choices(names, shares)[0]
        hit, under = _victim(plane, draw, victim, running)
        if hit:
            hits[victim] += 1
            phases.update(under)
            print(f"{hits.total()}: {victim}, {', '.join(sorted(under))}", file=sys.stderr)


def _victim(
    plane: Plane, draw: random.Random, victim: str, running: dict[str, str]
) -> tuple[bool, set[str]]:
    """Whether it was hit, and the phases that jobs were in then."""
    if victim == "worker":
        stages = _stage_of(plane.settings.home)
        there = {process: stages.get(process.pid, "starting") for process in plane.stages()}
        if not there:
            return False, set()
        # A phase first, so that short ones are hit as often as long ones.
        phase = draw.choice(sorted(set(there.values())))
        chosen = draw.choice([process for process, other in there.items() if other == phase])
        return kill(chosen), {phase}
    if victim in RAY_CORES:
        return plane.kill_ray(victim), set(running.values())
    number = draw.randrange(CONTROLLERS if victim == "controller" else APIS)
    return plane.kill(f"{victim}-{number}"), set(running.values())


def _finished(database: Database) -> int:
    with database.system_read() as session:
        return session.scalars(
            select(func.count(Stage.job_id)).where(Stage.outcome == "done")
        ).one()


def _phases(database: Database) -> dict[str, str]:
    """The phase of every job that is in a stage."""
    with database.system_read() as session:
        rows = session.execute(select(Job.id, Job.phase).where(Job.phase.in_(STAGES)))
        return {job: phase for job, phase in rows}


def _stage_of(home: Path) -> dict[int, str]:
    """What each process was last known to do."""
    if not log_of(home).exists():
        return {}
    lines = (line.split() for line in log_of(home).read_text().splitlines())
    return {int(pid): name.split(":")[1] for _, name, pid in lines}


def _orphans(plane: Plane) -> list[str]:
    """Actors that are still there after the controllers had a minute to sweep."""
    left: list[str] = []

    def gone() -> bool:
        nonlocal left
        left = plane.actors()
        return not left and not _working(plane)

    with contextlib.suppress(TimeoutError):  # what is left is told
        wait_until(gone, 60, "nothing is left")
    return left


def _working(plane: Plane) -> bool:
    work = plane.settings.work
    return work.is_dir() and any(work.iterdir())


if __name__ == "__main__":
    sys.exit(main())

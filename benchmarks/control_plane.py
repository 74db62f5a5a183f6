"""The control plane against its bars: submission, scheduling, fair share, phase gaps, uploads.

    python -m benchmarks.control_plane [--quick] [--json FILE]

The API is a process of its own, over real HTTP; PostgreSQL is a real server with its default
durability, started here. Run it on an idle machine: the clients need processors too. Exit code 1 if
a bar is missed. Without PostgreSQL its number is missing, and so is its bar.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
from sqlalchemy import insert, select, update

from cluster.controller.admission import admit_waiting
from cluster.controller.controller import Controller, Options
from cluster.controller.fair_share import Share, Waiting, admit
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from cluster.state.models import File, Job, Stage, Tenant
from cluster.tenancy.keys import create_key
from tests.control.postgresql import binary, execute, own_postgres
from tests.control.rows import add_tenant, file_row, job_row
from tests.control.stages import MemoryRunner, World

BARS = {
    "submit_p99_ms_sqlite": 50.0,
    "submit_p99_ms_postgres": 50.0,
    "schedule_pass_ms": 200.0,
    "fair_share_error": 0.05,
    "phase_gap_s": 0.5,
    "upload_peak_mib": 64.0,
}
CLIENTS, QUEUED, TENANTS = 16, 10_000, 1_000
MIB = 2**20
_START_S = 60.0


def prepare(database: Database, tenants: int, jobs: int) -> str:
    """Fill the state with queued jobs; a key of the first tenant."""
    database.migrate()
    for number in range(tenants):
        add_tenant(database, f"ten-{number}", weight=1.0 + number % 5, requests_per_second=1e6)
    values = []
    for number in range(jobs):
        row = job_row(f"ten-{number % tenants}", f"ftjob-{number}", created_at=float(number))
        values.append({c.key: getattr(row, c.key) for c in Job.__table__.columns})
    with database.system() as session:
        session.add(file_row("ten-0", "file-1"))
        if values:
            session.execute(insert(Job), values)
        return create_key(session, "ten-0", name="bench", now=1.0)[1]


@contextmanager
def served(settings: Settings) -> Iterator[tuple[str, int]]:
    """`safeft api` in a process: its address, and its process id."""
    file = settings.home / "settings.yaml"
    file.write_text(settings.model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["-m", "cluster.cli.main", "api", "--settings", str(file), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command])
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + _START_S
        while not _answers(f"{address}/healthz"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("`safeft api` did not start; what it said stands above")
            time.sleep(0.05)
        yield address, process.pid
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).is_success
    except httpx2.TransportError:
        return False


def offered(home: Path, url: str) -> Settings:
    return Settings(database=url, home=home, base_models={"tiny": BaseModelOffer(source="tiny")})


def submit_p99_ms(home: Path, url: str, each: int) -> float:
    database = Database(url)
    key = prepare(database, 10, QUEUED)
    database.close()
    body = {
        "model": "tiny",
        "training_file": "file-1",
        "method": {"type": "supervised", "supervised": {"constraints": ["l2"]}},
    }
    ready = threading.Barrier(CLIENTS)
    with served(offered(home, url)) as (address, _):

        def client(number: int) -> list[float]:
            headers = {"Authorization": f"Bearer {key}"}
            taken = []
            with httpx2.Client(base_url=address, headers=headers, timeout=60) as http:
                for turn in range(each + 3):
                    if turn == 3:  # the first ones open connections, and load certificates
                        ready.wait()
                    once = {"Idempotency-Key": f"{number}-{turn}"}
                    began = time.perf_counter()
                    answer = http.post("/v1/fine_tuning/jobs", json=body, headers=once)
                    if turn >= 3:
                        taken.append(time.perf_counter() - began)
                    answer.raise_for_status()
            return taken

        with ThreadPoolExecutor(CLIENTS) as pool:
            taken = sorted(t for times in pool.map(client, range(CLIENTS)) for t in times)
    return 1000 * taken[int(0.99 * len(taken))]


def schedule_pass_ms(home: Path) -> float:
    """Median of five passes, each over the whole queue."""
    database = Database(f"sqlite:///{home}/pass.db")
    prepare(database, TENANTS, QUEUED)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        with database.system() as session:
            assert len(admit_waiting(session, "compute", 64, 2.0)) == 64
        taken.append(time.perf_counter() - began)
        with database.system() as session:
            session.execute(update(Job).where(Job.phase == "training").values(phase="failed"))
    database.close()
    return 1000 * sorted(taken)[2]


def fair_share_error(jobs: int) -> float:
    """Largest relative distance of a tenant's served work from its weight's share."""
    draw = random.Random(0)
    shares = {f"t{n}": Share(weight=1.0 + n % 5, time=0.0, room=10**9) for n in range(20)}
    served_work: dict[str, float] = dict.fromkeys(shares, 0.0)
    left: list[Waiting] = []
    number, queue_time = 0, 0.0
    while number < jobs:
        have = Counter(job.tenant for job in left)
        for tenant in shares:
            for _ in range(5 - have[tenant]):
                number += 1
                cost = draw.uniform(0.5, 5.0)
                left.append(Waiting(f"j{number}", tenant, 1, cost, 0, float(number)))
        result = admit(left, shares, free=8, capacity=8, queue_time=queue_time)
        queue_time, chosen = result.queue_time, set(result.chosen)
        for tenant, reached in result.times.items():
            shares[tenant].time = reached
        for job in left:
            if job.id in chosen:
                served_work[job.tenant] += job.cost
        left = [job for job in left if job.id not in chosen]
    total, weights = sum(served_work.values()), sum(share.weight for share in shares.values())
    return max(
        abs(served_work[tenant] / total / (share.weight / weights) - 1)
        for tenant, share in shares.items()
    )


def phase_gap_s(home: Path, jobs: int) -> float:
    """Longest time from a stage's end to the moment when the next one's actor is asked for.

    The actors are of memory, and done when they are looked at: Ray's own start is not in this.
    """
    database = Database(f"sqlite:///{home}/gap.db")
    database.migrate()
    world = World(database, home / "gap")
    for number in range(jobs):
        world.add_job(f"ftjob-{number}")
    stop = threading.Event()
    controller = Controller(
        world.settings, database, world.store, MemoryRunner(), options=Options()
    )
    thread = threading.Thread(target=controller.run, args=[stop])
    thread.start()
    while any(world.job(f"ftjob-{number}").phase != "succeeded" for number in range(jobs)):
        time.sleep(0.2)
    stop.set()
    thread.join()
    gaps = []
    with database.system_read() as session:
        rows = session.scalars(select(Stage).order_by(Stage.job_id, Stage.attempt)).all()
    for earlier, later in itertools.pairwise(rows):
        # Between screening and training a job waits for room: that is not a gap.
        if earlier.job_id == later.job_id and later.stage != "training":
            assert later.asked_at is not None and earlier.ended_at is not None
            gaps.append(later.asked_at - earlier.ended_at)
    database.close()
    return max(gaps)


def upload(home: Path, size: int) -> tuple[float, float]:
    """The server's peak memory above idle (MiB), and its speed over that of a plain copy."""
    source = home / "source"
    with source.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    began = time.perf_counter()
    with source.open("rb") as file, (home / "copy").open("wb") as target:
        shutil.copyfileobj(file, target, MIB)
        os.fsync(target.fileno())
    copy_s = time.perf_counter() - began
    url = f"sqlite:///{home}/upload.db"
    database = Database(url)
    key = prepare(database, 1, 0)
    with database.system() as session:
        session.execute(update(Tenant).values(max_storage_bytes=4 * size))
    settings = offered(home, url).model_copy(update={"max_upload_bytes": 2 * size})
    with served(settings) as (address, pid):
        send(address, key, b"warm up")
        idle = memory_mib(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        began = time.perf_counter()
        with source.open("rb") as file:
            send(address, key, file)
        upload_s = time.perf_counter() - began
        peak = memory_mib(pid, "VmHWM") - idle
    with database.system_read() as session:
        assert max(session.scalars(select(File.bytes))) == source.stat().st_size
    database.close()
    return peak, copy_s / upload_s


def send(address: str, key: str, content: object) -> None:
    answer = httpx2.post(
        f"{address}/v1/files",
        files={"file": ("rows.jsonl", content)},  # type: ignore[dict-item]
        data={"purpose": "fine-tune"},
        headers={"Authorization": f"Bearer {key}"},
        timeout=600,
    )
    answer.raise_for_status()


def memory_mib(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {field}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller amounts of the same work")
    parser.add_argument("--json", type=Path, help="write {name: number} here")
    args = parser.parse_args()
    each = 10 if args.quick else 100
    size = (128 if args.quick else 2048) * MIB
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        found["submit_p99_ms_sqlite"] = submit_p99_ms(home, f"sqlite:///{home}/state.db", each)
        if binary("initdb"):
            with own_postgres() as server:
                execute(server.template, "CREATE DATABASE bench")
                url = server.template.format(name="bench")
                found["submit_p99_ms_postgres"] = submit_p99_ms(home, url, each)
        found["schedule_pass_ms"] = schedule_pass_ms(home)
        found["fair_share_error"] = fair_share_error(10_000)
        found["phase_gap_s"] = phase_gap_s(home, 5 if args.quick else 40)
        found["upload_peak_mib"], found["upload_over_copy"] = upload(home, size)
    missed = [name for name, bar in BARS.items() if found.get(name, 0.0) > bar]
    missed += ["upload_over_copy"] if found["upload_over_copy"] < 0.5 else []
    rounded = {name: round(value, 4) for name, value in found.items()}
    print(json.dumps(rounded, indent=1))
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(rounded, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

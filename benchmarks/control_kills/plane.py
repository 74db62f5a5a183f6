"""A control plane of processes that come back when they end, as under any supervisor."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from cluster.settings import Settings

ROOT = Path(__file__).parent.parent.parent
MARK = "SAFEFT_KILLS_MARK"  # in the environment of every process that is started here
RAY_CORES = ("gcs_server", "raylet")
_RAY_ENDS_S = 15.0


@dataclass
class _Service:
    """A process that is started again whenever it ended."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    killed: int = 0  # by us; it ended by itself `starts - 1 - killed` times

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.starts += 1


@dataclass
class Plane:
    """Ray, controllers and API processes over one home; a context manager.

    Args:
        settings: of the control plane; what they put into its home stays.
    """

    settings: Settings
    controllers: int
    apis: int
    services: dict[str, _Service] = field(default_factory=dict)
    ray_leftovers: int = 0

    def __enter__(self) -> Self:
        self._mark = secrets.token_hex(16)
        self._ray_dir = Path(tempfile.mkdtemp(prefix="safeft-k-", dir="/tmp"))
        self._stopping = threading.Event()
        self._lock = threading.RLock()  # a process is killed or started, not both at once
        home = self.settings.home
        home.mkdir(parents=True, exist_ok=True)
        file = home / "settings.json"
        file.write_text(self.settings.model_dump_json())
        ports = _free_ports(self.apis + 1)
        ray_port, api_ports = ports[0], ports[1:]
        self.urls = [f"http://127.0.0.1:{port}" for port in api_ports]
        self.address = f"127.0.0.1:{ray_port}"
        # Ray's own commands; with --block they end together.
        self._add("ray", [*_RAY, "--port", str(ray_port), *self._ray_options()])
        run = [sys.executable, "-m", "benchmarks.control_kills.processes"]
        for number in range(self.controllers):
            self._add(f"controller-{number}", [*run, "controller", str(file), self.address])
        for number, port in enumerate(api_ports):
            self._add(f"api-{number}", [*run, "api", str(file), str(port)])
        for service in self.services.values():
            service.start()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._keeper.join()
        for service in self.services.values():
            self._end(service)
        for process in self.processes():
            kill(process)
        shutil.rmtree(self._ray_dir, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """All that was started here and lives, with everything that it started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, name: str) -> bool:
        """SIGKILL a controller or an API process; False: it is not running just now."""
        with self._lock:
            service = self.services[name]
            if service.process is None or service.process.poll() is not None:
                return False
            service.process.kill()
            service.killed += 1
            return True

    def kill_ray(self, core: str) -> bool:
        """SIGKILL Ray's `gcs_server` or `raylet`; the rest of that Ray has to notice."""
        for process in self.processes():
            if _is(process, core):
                kill(process)
                with self._lock:
                    self.services["ray"].killed += 1
                return True
        return False

    def stages(self) -> list[psutil.Process]:
        """The processes in which stages are."""
        return [process for process in self.processes() if "ray::TinyHost" in _title(process)]

    def actors(self) -> list[str]:
        """Names of the stages' actors, asked for as a controller does."""
        run = [sys.executable, "-m", "benchmarks.control_kills.processes", "actors"]
        file = self.settings.home / "settings.json"
        done = subprocess.run(
            [*run, str(file), self.address],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            timeout=120,
            check=True,
        )
        names: list[str] = json.loads(done.stdout)
        return names

    def said(self, name: str, most: int = 3000) -> str:
        """The end of a service's log."""
        return self.services[name].log.read_text(errors="replace")[-most:]

    def environment(self) -> dict[str, str]:
        """Of each process: its own Ray's token, and one thread for each library."""
        return {
            **os.environ,
            MARK: self._mark,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._mark,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
        }

    def _add(self, name: str, command: list[str]) -> None:
        log = self.settings.home / f"{name}.log"
        self.services[name] = _Service(name, command, self.environment(), log)

    def _ray_options(self) -> list[str]:
        options = {
            "--node-ip-address": "127.0.0.1",
            "--num-cpus": "1",  # stages take none; Ray keeps so many idle workers ready
            "--temp-dir": str(self._ray_dir),
            "--object-store-memory": str(128 * 2**20),
            "--include-dashboard": "false",
        }
        return [part for option in options.items() for part in option]

    def _keep(self) -> None:
        while not self._stopping.wait(0.2):
            for service in self.services.values():
                process = service.process
                if process is not None and process.poll() is not None:
                    with self._lock:
                        self._end(service)
                        service.start()

    def _end(self, service: _Service) -> None:
        """Wait for what a dead service leaves, for a while, and then kill it."""
        assert service.process is not None
        with_it = [p for p in self.processes() if _is_rays(p)] if service.name == "ray" else []
        if service.process.poll() is None:
            service.process.kill()
        service.process.wait()
        if not self._stopping.is_set():
            _, with_it = psutil.wait_procs(with_it, _RAY_ENDS_S)
            self.ray_leftovers += len(with_it)
        for process in with_it:
            kill(process)


_RAY = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]


def _is_rays(process: psutil.Process) -> bool:
    """Whether it belongs to Ray itself, and ends with it."""
    title = _title(process)
    return "ray::" in title or "/ray/" in title


def _is(process: psutil.Process, core: str) -> bool:
    return _title(process).split(" ")[0].endswith(f"/{core}")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process) -> bool:
    """SIGKILL; False: it has ended by itself."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(met: Callable[[], object], seconds: float, what: str) -> None:
    """Poll; TimeoutError with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not met():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {seconds:g} s")
        time.sleep(0.2)

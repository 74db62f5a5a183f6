"""Prometheus beside a serving pool: the configuration of `deploy/prometheus` at the pool's own
addresses, in a process that ends with this one.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from safeft.errors import InputError

CONFIG = Path(__file__).parent.parent / "deploy" / "prometheus"
_READY_S, _STOP_S = 120.0, 30.0
_KEPT = "15d"
#: Linux ends the child when this process is killed: PR_SET_PDEATHSIG is 1, SIGTERM is 15.
_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


def program(wanted: bool | None) -> str | None:
    """Prometheus' executable; None: it is not wanted, or not there and only taken if it is.

    Raises:
        InputError: it is wanted and not there, or its rules are not.
    """
    if wanted is False:
        return None
    found = shutil.which("prometheus")
    if found and CONFIG.is_dir():
        return found
    if wanted is None:
        return None
    what = f"{CONFIG} is" if found else "prometheus is"
    raise InputError(f"--prometheus: {what} not there; install it (Debian: apt install prometheus)")


def free_port(port: int) -> int:
    """`port`, or for 0 one that the system has free.

    Raises:
        InputError: somebody listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(
                f"--prometheus-port: cannot listen on 127.0.0.1:{port} ({error.strerror}); choose "
                "another one, or --no-prometheus"
            ) from None
        return int(probe.getsockname()[1])


@contextmanager
def running_prometheus(
    executable: str, directory: Path, port: int, metrics_url: str, ray_nodes: Sequence[str]
) -> Iterator[str]:
    """Prometheus for the length of the block; its address.

    Args:
        directory: where its configuration, data, log and `targets/` are; kept afterwards.
        metrics_url: the page to read.
        ray_nodes: ``host:port`` of the pages that Ray's nodes have.

    Raises:
        InputError: it does not start; its log is named.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, log = directory / "prometheus.yml", directory / "prometheus.log"
    file.write_text(yaml.safe_dump(configuration(directory, metrics_url, ray_nodes)))
    command = [
        executable,
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--storage.tsdb.retention.time={_KEPT}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PARENT, *command],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; it is stopped in its turn
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_ready(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def configuration(directory: Path, metrics_url: str, ray_nodes: Sequence[str]) -> dict[str, Any]:
    """``deploy/prometheus/prometheus.yml`` with these addresses, and absolute paths."""
    found: dict[str, Any] = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    found["rule_files"] = [str(CONFIG / pattern) for pattern in found["rule_files"]]
    jobs = {job["job_name"]: job for job in found["scrape_configs"]}
    address, path = urlsplit(metrics_url).netloc, urlsplit(metrics_url).path
    jobs["safeft"] |= {"static_configs": [{"targets": [address]}], "metrics_path": path}
    del jobs["ray"]["file_sd_configs"]  # Ray writes that list only where its dashboard runs
    jobs["ray"]["static_configs"] = [{"targets": list(ray_nodes)}]
    targets = directory.absolute() / "targets"
    targets.mkdir(exist_ok=True)
    for one in (jobs["safeft-controller"], *found["alerting"]["alertmanagers"]):
        for listed in one["file_sd_configs"]:
            listed["files"] = [str(directory.absolute() / file) for file in listed["files"]]
    return found


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):  # it does not listen yet
                if client.get(f"{url}/-/ready").is_success:
                    return
            time.sleep(0.1)
    lines = log.read_text().strip().splitlines()
    said = lines[-1] if lines else "it says nothing"
    raise InputError(f"prometheus does not start ({said}); its log is {log}; or --no-prometheus")

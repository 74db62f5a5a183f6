"""A PostgreSQL of our own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import create_engine, text


def binary(name: str) -> str | None:
    if found := shutil.which(name):
        return found
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(versions[-1]) if versions else None


@contextlib.contextmanager
def own_postgres(*settings: str) -> Iterator[str]:
    """URL template (``{name}``) of a server on a Unix socket; it vanishes at the end."""
    initdb, server = binary("initdb"), binary("postgres")
    assert initdb is not None and server is not None
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="safeft-pg-"))
    if user:
        shutil.chown(home, user)
    data = home / "data"
    run = {"user": user, "cwd": home, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
    subprocess.run(
        [initdb, "-D", data, "-U", "safeft", "--auth=trust", "-E", "UTF8", "--no-sync"],
        check=True,
        capture_output=True,
        **run,
    )
    chosen = ["listen_addresses=", f"unix_socket_directories={home}", "max_connections=200"]
    log = (home / "log").open("wb")
    process = subprocess.Popen(
        [server, "-D", data, *(f"--{setting}" for setting in (*chosen, *settings))],
        stdout=log,
        stderr=subprocess.STDOUT,
        **run,
    )
    template = "postgresql://safeft@/{name}?host=" + str(home)
    try:
        _await(template.format(name="postgres"), process)
        yield template
    finally:
        process.send_signal(signal.SIGINT)  # ends open connections too
        process.wait()
        log.close()
        shutil.rmtree(home)


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    while True:
        assert process.poll() is None, "PostgreSQL did not start"
        with contextlib.suppress(Exception), engine.connect():
            break
        time.sleep(0.05)
    engine.dispose()


def execute(template: str, statement: str) -> None:
    """Run a statement outside of any transaction."""
    url = template.format(name="postgres").replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()

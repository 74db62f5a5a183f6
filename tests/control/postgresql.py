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


class Server:
    """A server on a Unix socket, with its data in a directory of its own.

    Attributes:
        template: its URL, with ``{name}`` for the database.
    """

    def __init__(self, *settings: str) -> None:
        initdb = binary("initdb")
        assert initdb is not None
        self._settings = settings
        # PostgreSQL refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        self._home = Path(tempfile.mkdtemp(prefix="safeft-pg-"))
        if user:
            shutil.chown(self._home, user)
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        self._run = {"user": user, "cwd": self._home, "env": environment}
        subprocess.run(
            [initdb, "-D", "data", "-U", "safeft", "--auth=trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            **self._run,  # type: ignore[call-overload]
        )
        self.template = "postgresql://safeft@/{name}?host=" + str(self._home)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        server = binary("postgres")
        assert server is not None
        directory = f"unix_socket_directories={self._home}"
        chosen = ["listen_addresses=", directory, "max_connections=200", *self._settings]
        with (self._home / "log").open("ab") as log:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [server, "-D", "data", *(f"--{setting}" for setting in chosen)],
                stdout=log,
                stderr=subprocess.STDOUT,
                **self._run,  # type: ignore[call-overload]
            )
        _await(self.template.format(name="postgres"), self._process)

    def stop(self) -> None:
        """Stop it: whoever is connected is thrown out."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def remove(self) -> None:
        """Remove its data."""
        shutil.rmtree(self._home)


@contextlib.contextmanager
def own_postgres(*settings: str) -> Iterator[Server]:
    """A running server; it vanishes at the end."""
    server = Server(*settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        server.remove()


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

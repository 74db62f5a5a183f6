"""Databases for the control plane's tests: the same tests on SQLite and on a real PostgreSQL."""

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

import pytest
from sqlalchemy import create_engine, text

from cluster.state import Database


def _postgres_binary(name: str) -> str | None:
    if found := shutil.which(name):
        return found
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(versions[-1]) if versions else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL prefix of a PostgreSQL of our own, on a Unix socket; its databases vanish with it."""
    initdb, server = _postgres_binary("initdb"), _postgres_binary("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL here: `apt install postgresql` runs these tests on it too")
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
    settings = ["listen_addresses=", f"unix_socket_directories={home}", "fsync=off"]
    log = (home / "log").open("wb")
    process = subprocess.Popen(
        [server, "-D", data, *(f"--{s}" for s in settings), "--max_connections=200"],
        stdout=log,
        stderr=subprocess.STDOUT,
        **run,
    )
    prefix = "postgresql://safeft@/{name}?host=" + str(home)
    try:
        _await(prefix.format(name="postgres"), process)
        yield prefix
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


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "state.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()
    return path


@pytest.fixture
def sqlite_url(_template: Path, tmp_path: Path) -> str:
    """A migrated SQLite database."""
    path = tmp_path / "state.db"
    shutil.copy(_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a schema, on each of the two."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
    else:
        with _postgres_database(request, "template0") as url:
            yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A migrated database, on each of the two."""
    if request.param == "sqlite":
        found = Database(request.getfixturevalue("sqlite_url"))
        yield found
        found.close()
        return
    with _postgres_database(request, request.getfixturevalue("_postgres_template")) as url:
        found = Database(url)
        yield found
        found.close()


@pytest.fixture(scope="session")
def _postgres_template(postgres: str) -> str:
    _execute(postgres, "CREATE DATABASE migrated")
    database = Database(postgres.format(name="migrated"))
    database.migrate()
    database.close()
    return "migrated"


@contextlib.contextmanager
def _postgres_database(request: pytest.FixtureRequest, template: str) -> Iterator[str]:
    prefix = request.getfixturevalue("postgres")
    name = f"test_{time.monotonic_ns()}"
    _execute(prefix, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield prefix.format(name=name)
    _execute(prefix, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(prefix: str, statement: str) -> None:
    url = prefix.format(name="postgres").replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()

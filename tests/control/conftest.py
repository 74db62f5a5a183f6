"""Databases for the control plane's tests: the same tests on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cluster.state import Database
from tests.control import ceph as ceph_server
from tests.control.postgresql import binary, execute, own_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL template of a PostgreSQL of our own."""
    if binary("initdb") is None or binary("postgres") is None:
        pytest.skip("no PostgreSQL here: `apt install postgresql` runs these tests on it too")
    with own_postgres("fsync=off") as server:
        yield server.template


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
    execute(postgres, "CREATE DATABASE migrated")
    database = Database(postgres.format(name="migrated"))
    database.migrate()
    database.close()
    return "migrated"


@contextlib.contextmanager
def _postgres_database(request: pytest.FixtureRequest, template: str) -> Iterator[str]:
    prefix = request.getfixturevalue("postgres")
    name = f"test_{time.monotonic_ns()}"
    execute(prefix, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield prefix.format(name=name)
    execute(prefix, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def ceph() -> Iterator[str]:
    """The address of a Ceph gateway of our own."""
    if missing := ceph_server.missing():
        pytest.skip(f"no Ceph here ({missing[0]}): `apt install ceph-mon ceph-osd radosgw`")
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(ceph_server.own_ceph())
        except ceph_server.NotStarted as error:
            pytest.skip(f"Ceph does not start here: {error}")
        yield url


@pytest.fixture
def moto_bucket(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    return _bucket(endpoint, "test", "test", monkeypatch, request)


@pytest.fixture
def ceph_bucket(ceph: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    access, secret = ceph_server.ACCESS, ceph_server.SECRET
    return _bucket(ceph, access, secret, monkeypatch, request)


@pytest.fixture
def bucket(moto_bucket: str) -> str:
    return moto_bucket


def _bucket(
    endpoint: str,
    access: str,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials it was made with
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    boto3.client("s3").create_bucket(Bucket=name)
    return name

"""What goes wrong around the control plane: the clock, the disk, the store, the database."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.config
import httpx2
import openai
import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import TimeoutError as NoTurn

from cluster.artifacts import ArtifactMissing, ArtifactUnavailable, s3
from cluster.artifacts.directory import DirectoryStore
from cluster.artifacts.s3 import PART, S3Store
from cluster.artifacts.store import digest
from cluster.controller.ray_watch import watched_ray
from cluster.controller.runner import Report
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database, group_commit
from cluster.state.models import File, Stage
from tests.control.postgresql import binary, execute, own_postgres
from tests.control.rows import add_tenant, file_row
from tests.control.server import Api, running_api
from tests.control.stages import World
from tests.control.test_api import submit

DAY = 24 * 3600.0
ROWS = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def lite(sqlite_url: str, tmp_path: Path) -> World:
    return World(Database(sqlite_url), tmp_path)


@pytest.fixture
def api(sqlite_url: str, tmp_path: Path) -> Iterator[Api]:
    database = Database(sqlite_url)
    with running_api(database, tmp_path / "home") as found:
        yield found
    database.close()


# The clock.


@pytest.mark.parametrize("leap", [-30 * DAY, -3600.0, 3600.0, 30 * DAY])
def test_jobs_go_on_when_the_clock_is_moved(
    database: Database, tmp_path: Path, leap: float
) -> None:
    world = World(database, tmp_path)
    world.now = 100 * DAY
    world.add_job("ftjob-runs")
    world.add_job("ftjob-faulty")
    world.add_job("ftjob-claimed")
    for job in ("ftjob-runs", "ftjob-faulty", "ftjob-claimed"):
        world.runner.script[f"{job}:training:3"] = Report("running")
    world.round(3)
    assert {world.job(f"ftjob-{name}").phase for name in ("runs", "faulty", "claimed")} == {
        "training"
    }
    world.runner.script["ftjob-faulty:training:3"] = None  # its next attempt waits a second
    world.round()
    world.now += 1
    world.make()._claims.take(5)  # by a controller that is killed: all of them
    world.now += leap
    world.runner.script.clear()
    world.round(40)
    for name in ("runs", "faulty", "claimed"):
        assert world.job(f"ftjob-{name}").phase == "succeeded", name
    with database.system_read() as session:
        for stage in session.scalars(select(Stage)):
            assert stage.ended_at is not None and stage.ended_at >= stage.started_at


def test_a_controller_that_is_killed_after_a_stage_leaves_no_claim_to_wait_for(
    lite: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    lite.add_job()
    lite.runner.script["training"] = Report("running")
    monkeypatch.setattr(lite.controller._claims, "release", lambda *_: None)  # killed before
    lite.round()
    assert (lite.job().phase, lite.job().lock_token) == ("queued", None)
    lite.controller = lite.make()
    lite.round()
    assert "ftjob-1:training:3" in lite.runner.started


def test_the_sweep_comes_also_when_the_clock_was_set_back(lite: World) -> None:
    lite.controller._options = lite.make()._options.__class__(sweep_s=60.0)
    lite.now = 100 * DAY
    lite.round()
    lite.now -= 30 * DAY
    lite.add_job(phase="succeeded")
    (lite.settings.work / "ftjob-1").mkdir(parents=True)
    lite.round()
    assert list(lite.settings.work.iterdir()) == []


# The disk.


class _Disk:
    """A disk that is full at one of the calls that write to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.full_at = 0, 0
        whole_open, fsync, link = Path.open, os.fsync, os.link

        def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "x" in mode or "w" in mode:
                self._use()
                return _File(whole_open(path, mode, *args, **options), self._use)
            return whole_open(path, mode, *args, **options)

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                self._use()
                return function(*args, **options)

            return call

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "fsync", counted(fsync))
        monkeypatch.setattr(os, "link", counted(link))

    def _use(self) -> None:
        self.calls += 1
        if self.calls == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _File:
    """A file whose writes and flushes count."""

    def __init__(self, file: io.BufferedWriter, use: Callable[[], None]) -> None:
        self._file, self._use = file, use

    def write(self, data: bytes) -> int:
        self._use()
        return self._file.write(data)

    def flush(self) -> None:
        self._use()
        self._file.flush()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_wherever_the_disk_is_full_an_artifact_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path)
    (tmp_path / "objects/files").mkdir()
    disk = _Disk(monkeypatch)

    def put() -> None:
        with store.writer("files/one") as writer:
            for _ in range(3):
                writer.write(b"x" * 1000)
            writer.commit()

    failed = 0
    for full_at in range(1, 100):
        disk.calls, disk.full_at = 0, full_at
        try:
            put()
            break
        except ArtifactUnavailable as error:
            failed += 1
            assert "is full" in str(error)
        assert list((tmp_path / "uploads").iterdir()) == []
        if (tmp_path / "objects/files/one").exists():  # only the name was not flushed any more
            assert digest(store, "files/one").bytes == 3000
        else:
            with pytest.raises(ArtifactMissing):
                store.read("files/one")
    assert failed >= 7  # opened, written three times, flushed, synced, linked
    disk.full_at = 0
    put()  # once there is room: the same again
    assert digest(store, "files/one").bytes == 3000


def test_a_link_on_a_full_disk_is_a_fault_that_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path)
    disk = _Disk(monkeypatch)
    disk.full_at = 1
    with pytest.raises(ArtifactUnavailable, match="is full"):
        store.link("files/one", 60, "x")
    assert store.link("files/one", 60, "x")


def test_with_a_full_disk_under_the_state_nothing_is_accepted_and_then_all_is(api: Api) -> None:
    client = api.tenant("ten_a")
    submit(client)
    api.database.close()  # so that each connection is a new one, with the limit

    def limit(connection: Any, _: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(api.database.engine, "connect", limit)
    with pytest.raises(openai.InternalServerError) as caught:
        for _ in range(2000):
            submit(client)
    assert caught.value.status_code == 503
    event.remove(api.database.engine, "connect", limit)
    api.database.close()
    assert submit(client).status == "validating_files"


def test_a_log_that_cannot_be_flushed_is_told_and_not_called_stored(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="Input/output"):
        patch.setattr(group_commit.os, "fsync", broken)
        add_tenant(database, "ten_a")
    add_tenant(database, "ten_b")
    database.close()


def test_what_waits_for_the_disk_waits_for_one_flush_together(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    add_tenant(database, "ten_a")
    flushes, begun, go_on = [], threading.Event(), threading.Event()

    def slow(log: Path) -> None:
        with database.system_read() as session:
            flushes.append(len(session.scalars(select(File)).all()))
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(group_commit, "_flush", slow)

    def write(number: int) -> None:
        with database.tenant("ten_a") as session:
            session.add(file_row("ten_a", f"file-{number}"))

    threads = [threading.Thread(target=write, args=[number]) for number in range(6)]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    assert database._group is not None
    while database._group._committed < 7:  # they wait for the disk and not for each other
        assert any(thread.is_alive() for thread in threads)
    assert all(thread.is_alive() for thread in threads)  # nobody is told before it is flushed
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert flushes == [1, 6]
    with database.tenant("ten_a") as session:
        session.scalars(select(File)).all()
    assert len(flushes) == 2  # what only read has nothing to flush
    database.close()


# Ray.


def _silent() -> bool:
    raise RuntimeError("no answer")


def _hangs() -> bool:
    threading.Event().wait(600)
    return True


@pytest.mark.parametrize("look", [lambda: False, _silent, _hangs], ids=["other", "silent", "hangs"])
def test_a_controller_whose_ray_is_gone_ends(look: Callable[[], bool]) -> None:
    lost = threading.Event()
    with watched_ray(look, lambda why: lost.set(), look_s=0.01, patience_s=0.1):
        assert lost.wait(60)


def test_a_controller_whose_ray_answers_again_goes_on() -> None:
    looks, seen, lost = iter([True, None, None, True, True]), threading.Event(), threading.Event()

    def look() -> bool:
        answer = next(looks, "done")
        if answer == "done":
            seen.set()
        return bool(answer) or _silent()

    with watched_ray(look, lambda why: lost.set(), look_s=0.01, patience_s=3600.0):
        assert seen.wait(60)
    assert not lost.is_set()


# S3.


class _Front:
    """A server in front of S3: passes on what `fault` does not answer."""

    def __init__(self, behind: str) -> None:
        front = self
        self.fault: Callable[[BaseHTTPRequestHandler], int | None] = lambda request: None
        self.requests = 0
        self.over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                front.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status = front.fault(self)
                if status is not None:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                headers = dict(self.headers.items())
                answer = httpx2.request(
                    self.command, behind + self.path, content=body, headers=headers, timeout=60
                )
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                size = len(answer.content)
                if self.command == "HEAD":
                    size = int(answer.headers.get("Content-Length", 0))
                self.send_header("Content-Length", str(size))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def front(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Front]:
    found = _Front(endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: None)  # its backoff
    yield found
    found.close()


BIG = bytes(range(256)) * (PART // 256) + b"the last part"


def _put(store: S3Store, key: str) -> None:
    with store.writer(key) as writer:
        writer.write(BIG)
        writer.commit()


@pytest.mark.parametrize("status", [500, 503])
def test_an_s3_that_fails_now_and_then_is_asked_again(
    front: _Front, bucket: str, status: int
) -> None:
    store = S3Store(bucket)
    front.fault = lambda request: status if front.requests % 2 else None
    _put(store, "files/one")
    assert b"".join(store.read("files/one")) == BIG
    front.fault = lambda request: None
    assert store.sweep(-60) == 0


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("verb", ["POST", "PUT", "GET"])
def test_an_s3_that_only_fails_is_a_fault_that_may_pass(
    front: _Front, bucket: str, status: int, verb: str
) -> None:
    store = S3Store(bucket)
    front.fault = lambda request: status if request.command == verb else None
    with pytest.raises(ArtifactUnavailable):
        _put(store, "files/one")
        b"".join(store.read("files/one"))
    front.fault = lambda request: None
    assert store.sweep(-60) == 0  # an upload that was begun was taken back
    _put(store, "files/one")
    assert b"".join(store.read("files/one")) == BIG


def test_an_s3_that_hangs_is_a_fault_that_may_pass(
    front: _Front, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = botocore.config.Config(read_timeout=0.5, retries={"total_max_attempts": 2})
    monkeypatch.setattr(s3, "_CONFIG", s3._CONFIG.merge(impatient))
    store = S3Store(bucket)
    front.fault = lambda request: 503 if front.over.wait(120) else None
    with pytest.raises(ArtifactUnavailable, match="does not answer"):
        store.read("files/one")


def test_an_upload_during_which_s3_fails_is_503_and_leaves_nothing(
    front: _Front, bucket: str, sqlite_url: str, tmp_path: Path
) -> None:
    database = Database(sqlite_url)
    settings = Settings(
        home=tmp_path / "home",
        artifacts=f"s3://{bucket}/plane",
        base_models={"tiny": BaseModelOffer(source="tiny")},
    )
    with running_api(database, tmp_path, settings=settings) as api:
        client = api.tenant("ten_a")
        front.fault = lambda request: 503 if "partNumber=2" in request.path else None
        with pytest.raises(openai.InternalServerError) as caught:
            client.files.create(file=("rows.jsonl", BIG), purpose="fine-tune")
        assert caught.value.status_code == 503
        assert client.files.list().data == []
        front.fault = lambda request: None
        store = api.services.store
        assert list(store.keys("")) == [] and store.sweep(-60) == 0
        file = client.files.create(file=("rows.jsonl", BIG), purpose="fine-tune")
        assert client.files.content(file.id).read() == BIG
    database.close()


# The database.


def test_a_controller_that_gets_no_turn_to_write_waits_and_is_no_bug(
    lite: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()

    def tick() -> None:
        stop.set()
        raise NoTurn("no turn came")

    monkeypatch.setattr(lite.controller, "tick", tick)
    lite.controller.run(stop)
    found = [(record.levelname, record.message) for record in caplog.records]
    assert found == [("WARNING", "the database does not answer (TimeoutError)")]


@pytest.mark.skipif(binary("initdb") is None, reason="no PostgreSQL here")
def test_jobs_wait_while_postgresql_restarts_and_go_on(tmp_path: Path) -> None:
    with own_postgres("fsync=off") as server:
        execute(server.template, "CREATE DATABASE plane")
        database = Database(server.template.format(name="plane"))
        database.migrate()
        world = World(database, tmp_path)
        for number in range(3):
            world.add_job(f"ftjob-{number}")
        world.runner.script["training"] = Report("running")
        world.round(3)
        with running_api(database, tmp_path / "home") as api, _running(world):
            client = api.client(api.key("ten_a"))
            server.stop()
            with pytest.raises(openai.InternalServerError) as caught:
                client.files.list()
            assert caught.value.status_code == 503
            server.start()
            assert [file.id for file in client.files.list()] == ["file-1"]
            world.runner.script.clear()
            ends = time.monotonic() + 120
            while any(world.job(f"ftjob-{n}").phase != "succeeded" for n in range(3)):
                assert time.monotonic() < ends
                world.now += 1
                time.sleep(0.05)
        database.close()


@contextlib.contextmanager
def _running(world: World) -> Iterator[None]:
    """A controller that works by itself."""
    stop = threading.Event()
    thread = threading.Thread(target=world.make(tick_s=0.02).run, args=[stop], daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)

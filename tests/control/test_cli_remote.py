"""The commands that talk to the API: what they print, and what a dropped connection costs."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import select, text
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.remote import ApiProblem, Remote
from cluster.events import add_event
from cluster.provenance import ProvenanceError
from cluster.state import Database
from cluster.state.models import File, Job
from cluster.tenancy.audit import AuditBroken
from cluster.tenancy.bootstrap import first_key
from safeft.errors import InputError
from tests.control.server import Api, running_api
from tests.control.test_api import L2, finish

ROWS = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def api(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    database = Database(sqlite_url)
    with running_api(database, tmp_path / "home") as found:
        monkeypatch.setenv("SAFEFT_API", found.url)
        yield found
    database.close()


def run(*arguments: str | Path) -> str:
    """The command's standard output; what it raises is raised here."""
    result = CliRunner().invoke(app, list(map(str, arguments)), standalone_mode=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if isinstance(result.return_value, int) and result.return_value:
        raise typer.Exit(result.return_value)
    return result.stdout


@contextlib.contextmanager
def cutting_proxy(url: str, lives: list[int]) -> Iterator[str]:
    """Passes each connection on, and cuts it after so many bytes of the answer; then no more."""
    host, port = url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, budget: float) -> None:
        with contextlib.suppress(OSError):
            while budget > 0 and (data := source.recv(65536)):
                target.sendall(data[: int(min(budget, len(data)))])
                budget -= len(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            budget = lives.pop(0) if lives else float("inf")
            for pair in ((client, server, float("inf")), (server, client, budget)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def test_a_job_is_submitted_shown_followed_and_cancelled(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEFT_API_KEY", str(api.tenant("ten_a").api_key))
    data = tmp_path / "rows.jsonl"
    data.write_bytes(ROWS)
    submit = ["submit", data, "--model", "tiny", "--constraint", "l2", "--epochs", "2", "--json"]
    job = json.loads(run(*submit, "--validation", data))
    assert job["hyperparameters"]["n_epochs"] == 2 and job["validation_file"]
    assert job["id"] in run("jobs")
    assert json.loads(run("jobs", job["id"], "--json"))["id"] == job["id"]
    assert "Created fine-tuning job" in run("logs", job["id"])
    assert json.loads(run("report", job["id"]))["phase"] == "submitted"
    assert "paused" in run("pause", job["id"])
    assert "submitted" in run("resume", job["id"])
    assert "cancelled" in run("cancel", job["id"])
    assert "Fine-tuning job cancelled" in run("logs", "-f", job["id"])
    with pytest.raises(ApiProblem, match="No such fine-tuning job"):
        run("jobs", "ftjob-none")


@pytest.mark.parametrize(
    ("error", "code"),
    [("dataset_rejected", 3), ("safety_gate_failed", 4), ("internal_error", 1)],
)
def test_a_followed_jobs_end_is_the_exit_code(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, code: int
) -> None:
    monkeypatch.setenv("SAFEFT_API_KEY", str(api.tenant("ten_a").api_key))
    data = tmp_path / "rows.jsonl"
    data.write_bytes(ROWS)

    def fail_it() -> None:
        while True:
            with api.database.system_read() as session:
                found = session.scalars(select(Job.id)).first()
            if found:
                break
        finish(api, found, "failed", error_code=error, error_message="so it is")

    thread = threading.Thread(target=fail_it)
    thread.start()
    with pytest.raises(typer.Exit) as caught:
        run("submit", data, "--model", "tiny", "--constraint", "l2", "-f")
    thread.join()
    assert caught.value.exit_code == code


def test_followed_events_are_whole_over_dropped_connections(api: Api) -> None:
    client = api.tenant("ten_a")
    file = client.files.create(file=ROWS, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method=L2)
    with api.database.system() as session:
        row = session.get_one(Job, job.id)
        for number in range(30):
            add_event(session, row, f"step {number}", now=2.0)
    finish(api, job.id, "succeeded")
    waits: list[float] = []
    # Cut in the headers, within an event, after a few of them.
    with cutting_proxy(api.url, [10, 400, 1200, 0, 2000, 3000]) as url:
        remote = Remote(url, str(client.api_key), sleep=waits.append)
        found = [event["message"] for event in remote.events(job.id)]
    assert found == [
        f"Created fine-tuning job: {job.id}",
        *(f"step {number}" for number in range(30)),
        "it has succeeded",
    ]
    assert len(waits) == 6


def test_a_request_whose_answer_was_lost_is_not_done_twice(api: Api, tmp_path: Path) -> None:
    client = api.tenant("ten_a")
    data = tmp_path / "rows.jsonl"
    data.write_bytes(ROWS)
    seen: list[int] = []
    with cutting_proxy(api.url, [0, 5]) as url:
        remote = Remote(url, str(client.api_key), sleep=lambda _: None)
        file = remote.upload(data, lambda _, done, total: seen.append(done))
        assert seen[-1] == len(ROWS)
    with cutting_proxy(api.url, [0, 5]) as url:
        remote = Remote(url, str(client.api_key), sleep=lambda _: None)
        body = {"model": "tiny", "training_file": file["id"], "method": L2}
        job = remote.post("/v1/fine_tuning/jobs", body)
    with api.database.system_read() as session:
        assert list(session.scalars(select(File.id))) == [file["id"]]
        assert list(session.scalars(select(Job.id))) == [job["id"]]


def test_an_api_that_is_not_there_is_named_after_some_tries() -> None:
    waits: list[float] = []
    remote = Remote("http://127.0.0.1:1", "sf-x", sleep=waits.append)
    with pytest.raises(ApiProblem, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        remote.get("/v1/files")
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0] and max(waits) <= 30.0
    with pytest.raises(ApiProblem, match="cannot be reached"):
        list(remote.events("ftjob-1"))


def test_without_a_key_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFEFT_API_KEY", raising=False)
    with pytest.raises(InputError, match="SAFEFT_API_KEY is not set"):
        run("jobs")


def test_administration_from_the_first_key_to_the_verified_log(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEFT_API_KEY", first_key(api.database, 1.0))
    run("tenants", "add", "acme", "--weight", "2", "--reason", "ticket 1")
    made = json.loads(run("keys", "add", "acme", "--name", "ci", "--reason", "ticket 2"))
    run("policy", "set", "acme", "--constraint", "l2", "--reason", "ticket 3")
    rules = ["--min-refusal", "0.9", "--require", "asft", "--require-own-rows"]
    run("policy", "set", "acme", *rules, "--reason", "ticket 3a")
    policy = json.loads(run("policy", "show", "acme"))
    assert policy["min_refusal"] == 0.9 and policy["required_constraints"] == ["asft"]
    assert policy["constraints"] == ["l2"] and policy["require_own_rows"]
    changed = json.loads(run("policy", "set", "acme", "--no-constraints", "--reason", "ticket 3c"))
    assert changed["constraints"] == [] and changed["require_own_rows"]
    run("tenants", "set", "acme", "--max-open-jobs", "7", "--reason", "ticket 3b")
    limits = json.loads(run("tenants", "list", "--json"))[0]
    assert (limits["name"], limits["weight"], limits["max_open_jobs"]) == ("acme", 2.0, 7)
    run("tenants", "suspend", "acme", "--reason", "ticket 4")
    assert "suspended" in run("tenants", "list")
    run("tenants", "restore", "acme", "--reason", "ticket 5")
    run("keys", "revoke", made["id"], "--reason", "ticket 6")
    with pytest.raises(InputError, match="no tenant nobody"):
        run("policy", "show", "nobody")
    found = json.loads(run("audit", "verify"))
    assert found["entries"] == 11
    log = json.loads(run("audit", "show"))
    tickets = ["1", "2", "3", "3a", "3c", "3b", "4", "5", "6"]
    assert [entry["reason"] for entry in log][-9:] == [f"ticket {n}" for n in tickets]
    assert json.loads(run("audit", "verify", "--head", log[3]["sha256"])) == found
    with api.database.system() as session:  # somebody with the database's password
        session.execute(text("DROP TRIGGER audit_no_UPDATE"))
        session.execute(text("UPDATE audit SET reason = 'ticket 99' WHERE seq = 5"))
    with pytest.raises(AuditBroken, match="entry 5 was changed"):
        run("audit", "verify")


def test_a_model_without_provenance_does_not_verify(api: Api, tmp_path: Path) -> None:
    pem = tmp_path / "key.pem"
    pem.write_text(api.services.public_key.pem)
    with pytest.raises(ProvenanceError, match="nobody vouches"):
        run("models", "verify", tmp_path, "--public-key", pem)
    with pytest.raises(InputError, match="cannot be read"):
        run("models", "verify", tmp_path, "--public-key", tmp_path / "none")


def test_the_api_is_not_served_in_the_clear_to_everybody(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keys would travel in the clear"):
        run("api", "--host", "0.0.0.0")


def test_a_database_is_migrated_by_command(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"database": f"sqlite:///{tmp_path}/new.db"}
    (tmp_path / "s.yaml").write_text(json.dumps(settings))
    assert "this version's schema" in run("database", "migrate", "--settings", tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("compute_slots: none")
    with pytest.raises(InputError, match="compute_slots"):
        run("database", "migrate", "--settings", tmp_path / "s.yaml")

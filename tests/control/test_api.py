"""The API as the official client sees it, over real HTTP, on both databases."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import select, text
from sqlalchemy.exc import TimeoutError as NoTurn

from cluster.api import events
from cluster.api.files import _announce
from cluster.controller.phases import FINAL, WAITING, after
from cluster.events import add_event
from cluster.settings import BaseModelOffer, Price, Settings
from cluster.state import Database
from cluster.state.models import ApiKey, AuditEntry, File, Job, PublishedModel, Stage, Tenant
from cluster.tenancy.audit import entries, verify
from cluster.tenancy.keys import authenticate_all
from cluster.tenancy.quotas import RateLimiter, storage_left
from tests.control.rows import file_row
from tests.control.server import Api, running_api

ROWS = b'{"messages": [{"role": "user", "content": "hi"}]}\n'
L2: Any = {"type": "supervised", "supervised": {"constraints": ["l2"]}}
NO_CONSTRAINTS: Any = {"type": "supervised", "supervised": {"constraints": []}}


@pytest.fixture
def api(database: Database, tmp_path: Path) -> Iterator[Api]:
    with running_api(database, tmp_path) as found:
        yield found


@pytest.fixture
def lite(sqlite_url: str, tmp_path: Path) -> Iterator[Api]:
    """On SQLite only, for what does not depend on the database."""
    database = Database(sqlite_url)
    rates = RateLimiter(clock=lambda: 0.0)
    options = {"rates": rates, "upload_idle_s": 0.3, "max_upload_bytes": 1 << 20}
    with running_api(database, tmp_path, **options) as found:
        yield found
    database.close()


def submit(client: openai.OpenAI, **options: Any) -> Any:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        **{"model": "tiny", "training_file": file.id, "method": L2, **options}
    )


def finish(api: Api, job_id: str, phase: str, **fields: Any) -> None:
    with api.database.system() as session:
        job = session.get_one(Job, job_id)
        job.phase, job.finished_at = phase, 5.0
        for name, value in fields.items():
            setattr(job, name, value)
        add_event(session, job, f"it has {phase}", now=5.0)


def test_files_by_the_official_client(api: Api) -> None:
    client = api.tenant("ten_a")
    content = bytes(range(256)) * 40_000  # ten megabytes: several blocks
    file = client.files.create(file=("dir/my rows.jsonl", content), purpose="fine-tune")
    assert (file.bytes, file.filename, file.status) == (len(content), "my rows.jsonl", "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    more = [client.files.create(file=io.BytesIO(ROWS), purpose="fine-tune") for _ in range(3)]
    everything = [file, *more]
    assert sorted(f.id for f in client.files.list(limit=2)) == sorted(f.id for f in everything)
    assert next(f.id for f in client.files.list(order="asc")) == file.id
    assert client.files.list(purpose="vision").data == []
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with api.database.system_read() as session:
        row = session.get_one(File, more[0].id)
    assert row.sha256 == hashlib.sha256(ROWS).hexdigest()
    assert list(api.services.store.keys("")) == sorted(f"tenants/ten_a/files/{f.id}" for f in more)


def test_jobs_by_the_official_client(api: Api) -> None:
    client = api.tenant("ten_a")
    job = submit(client, suffix="mine", seed=7, metadata={"team": "x", "priority": "3"})
    assert (job.status, job.model, job.seed, job.organization_id) == (
        "validating_files",
        "tiny",
        7,
        "ten_a",
    )
    assert job.hyperparameters.n_epochs == 3
    assert job.method.supervised.constraints[0]["kind"] == "l2"
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    others = [submit(client) for _ in range(4)]
    found = [j.id for j in client.fine_tuning.jobs.list(limit=2)]
    assert sorted(found) == sorted([job.id, *(j.id for j in others)])
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={"team": "x"})] == [job.id]
    assert client.fine_tuning.jobs.list(metadata={"team": "y"}).data == []
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert [e.message for e in events] == [f"Created fine-tuning job: {job.id}"]
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.fine_tuning.jobs.cancel(job.id)


def test_a_succeeded_job_has_its_model_its_tokens_and_its_checkpoint(api: Api) -> None:
    client = api.tenant("ten_a")
    job = submit(client)
    facts = {
        "training": {"trained_tokens": 99, "steps": 12, "final_loss": 0.5},
        "evaluating": {"task_loss": 0.25},
    }
    finish(api, job.id, "succeeded", model_id="ft:tiny:ten_a::1", facts=facts)
    with api.database.system() as session:
        session.add(
            PublishedModel(
                id="ft:tiny:ten_a::1",
                tenant_id="ten_a",
                job_id=job.id,
                base_model="tiny",
                kind="adapter",
                state="probing",
                prefix="tenants/ten_a/models/m1",
                provenance={},
                created_at=5.0,
            )
        )
    with api.services.store.writer("tenants/ten_a/models/m1/a.safetensors") as writer:
        writer.write(b"weights")
        writer.commit()
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.fine_tuned_model, job.trained_tokens) == ("ft:tiny:ten_a::1", 99)
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert (checkpoint.step_number, checkpoint.metrics.valid_loss) == (12, 0.25)
    assert [m.id for m in client.models.list()] == ["tiny", "ft:tiny:ten_a::1"]
    assert client.models.retrieve("ft:tiny:ten_a::1").owned_by == "ten_a"
    safety = raw(api, "GET", "/v1/safety/models/ft:tiny:ten_a::1", client.api_key).json()
    link = safety["files"]["a.safetensors"]
    assert httpx2.get(api.url + link).content == b"weights"  # without a key
    assert httpx2.get(api.url + link[:-3]).status_code == 404
    assert client.models.delete("ft:tiny:ten_a::1").deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ft:tiny:ten_a::1")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")
    assert list(api.services.store.keys("tenants/ten_a/models")) == []


def test_a_failed_job_says_why_as_openai_does(api: Api) -> None:
    client = api.tenant("ten_a")
    job = submit(client)
    finish(
        api,
        job.id,
        "failed",
        error_code="dataset_rejected",
        error_param="training_file",
        error_message="9 of 10 rows",
        facts={"screening": {"verdict": "rejected"}},
    )
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert (error.code, error.param) == ("dataset_rejected", "training_file")
    path = f"/v1/safety/jobs/{job.id}/screening"
    assert raw(api, "GET", path, client.api_key).json()["verdict"] == "rejected"
    path = f"/v1/safety/jobs/{job.id}/evaluation"
    assert raw(api, "GET", path, client.api_key).json()["error"]["code"] == "not_yet"


def raw(api: Api, method: str, path: str, key: str, **options: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
    return httpx2.request(method, api.url + path, headers=headers, **options)


def test_a_job_is_paused_and_goes_on_where_it_was(api: Api) -> None:
    client = api.tenant("ten_a")
    jobs = client.fine_tuning.jobs
    job = submit(client)
    assert jobs.pause(job.id).phase == "paused"  # type: ignore[attr-defined]
    assert jobs.resume(job.id).phase == "submitted"  # type: ignore[attr-defined]
    with api.database.system() as session:
        session.get_one(Job, job.id).phase = "training"
    assert jobs.pause(job.id).status == "running"  # until its actor has stopped
    with api.database.system_read() as session:
        assert session.get_one(Job, job.id).wish == "pause"
    jobs.resume(job.id)
    with api.database.system() as session:
        row = session.get_one(Job, job.id)
        assert row.wish is None
        row.phase, row.resume_phase = "paused", "training"
    assert jobs.resume(job.id).status == "queued"
    with pytest.raises(openai.BadRequestError, match="not paused"):
        jobs.resume(job.id)
    with api.database.system() as session:
        session.get_one(Job, job.id).phase = "training"
    assert jobs.cancel(job.id).status == "cancelled"  # nothing takes that back
    assert jobs.retrieve(job.id).phase == "cancelling"  # type: ignore[attr-defined]
    assert jobs.pause(job.id).phase == "cancelling"  # type: ignore[attr-defined]


def test_the_event_stream_goes_on_after_the_last_event_that_was_read(api: Api) -> None:
    client = api.tenant("ten_a")
    job = submit(client)
    read: list[dict[str, Any]] = []
    path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"

    def follow(last: str | None) -> None:
        headers = {"Authorization": f"Bearer {client.api_key}"}
        if last:
            headers["Last-Event-ID"] = last
        with httpx2.stream("GET", api.url + path, headers=headers, timeout=20) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    read.append(json.loads(line[6:]))
                    if last is None and len(read) == 2:
                        return  # the connection drops

    reader = threading.Thread(target=follow, args=[None])
    reader.start()
    for number in range(3):
        with api.database.system() as session:
            found = session.scalars(select(Job).where(Job.id == job.id).with_for_update()).one()
            add_event(session, found, f"step {number}", now=2.0)
    reader.join(20)
    finish(api, job.id, "succeeded")
    follow(read[-1]["id"])
    assert [e["message"] for e in read[1:]] == ["step 0", "step 1", "step 2", "it has succeeded"]
    listed = client.fine_tuning.jobs.list_events(job.id, limit=2)
    assert [e.message for e in listed] == [e["message"] for e in reversed(read)]


def test_a_stream_ends_with_the_key(lite: Api) -> None:
    client = lite.tenant("ten_a")
    job = submit(client)
    path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
    headers = {"Authorization": f"Bearer {client.api_key}"}
    with httpx2.stream("GET", lite.url + path, headers=headers, timeout=20) as answer:
        lines = answer.iter_lines()
        assert any(line.startswith("data:") for line in lines)
        with lite.database.system() as session:
            session.scalars(select(ApiKey)).one().revoked_at = 2.0
        assert any(line == "event: error" for line in lines)


@pytest.mark.parametrize("end", ["left", "finished", "failed"])
def test_a_tenants_streams_are_bounded_and_each_is_given_back_however_it_ends(
    lite: Api, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    lite.services.streams.most = 2
    clients = [lite.tenant(tenant) for tenant in ("ten_a", "ten_b")]
    jobs = [submit(client).id for client in clients]

    def follow(tenant: int) -> contextlib.AbstractContextManager[httpx2.Response]:
        path = f"{lite.url}/v1/fine_tuning/jobs/{jobs[tenant]}/events?stream=true"
        headers = {"Authorization": f"Bearer {clients[tenant].api_key}"}
        return httpx2.stream("GET", path, headers=headers, timeout=60)

    def failed(*_: object) -> None:
        raise NoTurn("no connection came free")

    with contextlib.ExitStack() as mine:
        answers = [mine.enter_context(follow(0)) for _ in range(2)]
        with follow(0) as refused:
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
            told = json.loads(refused.read())["error"]
        assert told["code"] == "too_many_streams" and "2 event streams are open" in told["message"]
        with follow(1) as other:
            assert other.status_code == 200
        if end == "finished":
            finish(lite, jobs[0], "succeeded")
            assert all(list(answer.iter_lines())[-2] == "data: [DONE]" for answer in answers)
        elif end == "failed":
            monkeypatch.setattr(events, "_after", failed)
            for answer in answers:
                with pytest.raises(httpx2.RemoteProtocolError):
                    answer.read()
    until = time.monotonic() + 60
    while lite.services.streams:  # the server notices a closed connection on its own time
        assert time.monotonic() < until
        time.sleep(0.01)
    with follow(0) as again:
        assert again.status_code == 200


def test_nothing_of_another_tenant_exists(api: Api) -> None:
    mine, other = api.tenant("ten_a"), api.tenant("ten_b")
    job = submit(other)
    model = "ft:tiny:ten_b::1"
    with api.database.system() as session:
        session.add(
            PublishedModel(
                id=model,
                tenant_id="ten_b",
                job_id=job.id,
                base_model="tiny",
                kind="adapter",
                state="serving",
                prefix="p",
                provenance={},
                created_at=1.0,
            )
        )
    assert mine.files.list().data == [] and mine.fine_tuning.jobs.list().data == []
    assert [m.id for m in mine.models.list()] == ["tiny"]
    jobs = "/v1/fine_tuning/jobs"
    file = "file-1"
    probes = [
        *(("GET", f"/v1/files/{{}}{end}", job.training_file) for end in ("", "/content")),
        ("DELETE", "/v1/files/{}", job.training_file),
        *(("GET", f"{jobs}/{{}}{end}", job.id) for end in ("", "/events", "/checkpoints")),
        *(("POST", f"{jobs}/{{}}/{end}", job.id) for end in ("cancel", "pause", "resume")),
        *(("GET", f"/v1/safety/jobs/{{}}{e}", job.id) for e in ("", "/screening", "/evaluation")),
        *((verb, "/v1/models/{}", model) for verb in ("GET", "DELETE")),
        ("GET", "/v1/safety/models/{}", model),
        ("GET", f"{jobs}?after={{}}", job.id),
        ("GET", "/v1/files?after={}", job.training_file),
    ]
    for verb, path, theirs in probes:
        nobodys = f"{theirs[:-4]}zzzz"
        answers = [raw(api, verb, path.format(i), mine.api_key) for i in (theirs, nobodys)]
        texts = [a.text.replace(i, "ID") for a, i in zip(answers, (theirs, nobodys), strict=True)]
        assert [a.status_code for a in answers] == [404, 404], (verb, path)
        assert texts[0] == texts[1], (verb, path)
    for given in (job.training_file, file):
        with pytest.raises(openai.BadRequestError, match="No such File object"):
            mine.fine_tuning.jobs.create(model="tiny", training_file=given, method=L2)
    assert other.fine_tuning.jobs.retrieve(job.id).status == "validating_files"


def test_a_repeated_post_does_nothing_twice(api: Api) -> None:
    client = api.tenant("ten_a")
    once = {"Idempotency-Key": "k1"}
    files = [
        client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", extra_headers=once)
        for _ in range(3)
    ]
    assert len({f.id for f in files}) == 1
    assert len(list(api.services.store.keys(""))) == 1
    with pytest.raises(openai.ConflictError, match="another request"):
        client.files.create(file=("a.jsonl", b"other"), purpose="fine-tune", extra_headers=once)

    def create(epochs: int) -> Any:
        return client.fine_tuning.jobs.create(
            model="tiny",
            training_file=files[0].id,
            method={
                **L2,
                "supervised": {"hyperparameters": {"n_epochs": epochs}, **L2["supervised"]},
            },
            extra_headers={"Idempotency-Key": "k2"},
        )

    with ThreadPoolExecutor(6) as pool:
        jobs = list(pool.map(lambda _: create(1), range(6)))
    assert len({j.id for j in jobs}) == 1
    with pytest.raises(openai.ConflictError):
        create(2)
    assert len(client.fine_tuning.jobs.list().data) == 1
    for _ in range(2):
        cancelled = client.fine_tuning.jobs.cancel(
            jobs[0].id, extra_headers={"Idempotency-Key": "3"}
        )
        assert cancelled.status == "cancelled"
    # Another tenant's key of the same name is another key.
    other = api.tenant("ten_b")
    assert (
        other.files.create(file=("b", b"other"), purpose="fine-tune", extra_headers=once).bytes == 5
    )


def test_submissions_at_once_do_not_wait_for_each_other_in_a_circle(api: Api) -> None:
    client = api.tenant("ten_a")
    file = client.files.create(file=ROWS, purpose="fine-tune")

    def create(number: int) -> str:
        headers = {"Idempotency-Key": f"k{number}"}
        return client.fine_tuning.jobs.create(
            model="tiny", training_file=file.id, method=L2, extra_headers=headers
        ).id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(create, range(24)))) == 24


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "../../etc/passwd"}, "validation_file"),
        ({"suffix": "../x"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "supervised", "supervised": {"constraints": ["none"]}}}, None),
        ({"metadata": {"constraints": "nonsense"}, "method": {"type": "supervised"}}, None),
        ({"metadata": {"priority": "high"}}, None),
        ({"metadata": {"constraints": "cwac"}, "method": NO_CONSTRAINTS}, None),
        ({"extra_body": {"temperature": 1}}, "temperature"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 3}, "extra": 2}, "training.batch_size"),
    ],
)
def test_wrong_requests_are_told_the_parameter(
    lite: Api, change: dict[str, Any], param: str
) -> None:
    client = lite.tenant("ten_a")
    if workers := change.pop("extra", None):
        supervised = {**L2["supervised"], "workers": workers}
        change = {**change, "method": {"type": "supervised", "supervised": supervised}}
    with pytest.raises(openai.BadRequestError) as caught:
        submit(client, **change)
    error = caught.value
    assert error.type == "invalid_request_error"
    assert param is None or str(error.param).startswith(param), (error.param, error.message)
    assert client.fine_tuning.jobs.list().data == []


def test_values_that_no_database_holds_are_wrong_requests(api: Api) -> None:
    client = api.tenant("ten_a")
    for path in (
        "/v1/files/%00",
        "/v1/fine_tuning/jobs/a%00b",
        "/v1/models/%00",
        "/v1/files?after=%00",
    ):
        assert raw(api, "GET", path, client.api_key).status_code in (400, 404), path
    with pytest.raises(openai.BadRequestError):
        submit(client, training_file="file-\x00")
    with pytest.raises(openai.BadRequestError):
        submit(client, metadata={"a": "\x00"})


def test_a_constraints_wrong_setting_is_named(lite: Api) -> None:
    wrong = {"type": "supervised", "supervised": {"constraints": [{"kind": "l2", "lam": "much"}]}}
    with pytest.raises(openai.BadRequestError, match=r"constraints\.l2\.lam: Input should be"):
        submit(lite.tenant("ten_a"), method=wrong)


def test_a_policy_gives_the_constraints_and_may_require_some(lite: Api) -> None:
    client = lite.tenant(
        "ten_a", policy={"constraints": ["asft", "l2"], "required_constraints": ["asft"]}
    )
    job = submit(client, method={"type": "supervised"})
    assert [c["kind"] for c in job.method.supervised.constraints] == ["asft", "l2"]
    named = submit(client, method={"type": "supervised"}, metadata={"constraints": "asft"})
    assert [c["kind"] for c in named.method.supervised.constraints] == ["asft"]
    with pytest.raises(openai.BadRequestError, match="your policy requires asft"):
        submit(client)
    # Neither is a constraint that does nothing the one that is required.
    empty = {"type": "supervised", "supervised": {"constraints": [{"kind": "asft", "lam": 0}]}}
    with pytest.raises(openai.BadRequestError, match="requires asft with its defaults"):
        submit(client, method=empty)
    beside = {"type": "supervised", "supervised": {"constraints": ["asft", {"kind": "l2"}]}}
    assert len(submit(client, method=beside).method.supervised.constraints) == 2
    demanding = lite.tenant("ten_b", policy={"required_constraints": ["cwac", "asft"]})
    found = submit(demanding, method={"type": "supervised"}).method.supervised.constraints
    assert [c["kind"] for c in found] == ["cwac", "asft"]


def test_a_job_that_says_nothing_replays_the_base_models_own_rows(lite: Api) -> None:
    client = lite.tenant("ten_a")
    unset = submit(client, method={"type": "supervised"}).method.supervised
    assert (unset.constraints, unset.safety_rows, unset.answer_rows) == ([], "auto", "auto")
    chosen = {"constraints": ["asft"], "safety_rows": 4, "answer_rows": 0}
    named = submit(client, method={"type": "supervised", "supervised": chosen}).method.supervised
    assert [c["kind"] for c in named.constraints] == ["asft"]
    assert (named.safety_rows, named.answer_rows) == (4, 0)
    strict = lite.tenant("ten_b", policy={"require_own_rows": True})
    submit(strict, method={"type": "supervised"})
    with pytest.raises(openai.BadRequestError, match="safety_rows: your policy requires auto"):
        submit(strict, method={"type": "supervised", "supervised": chosen})


def test_an_unknown_model_is_not_found(lite: Api) -> None:
    with pytest.raises(openai.NotFoundError, match="choose from: tiny"):
        submit(lite.tenant("ten_a"), model="gpt-9")


def test_keys_open_what_their_scopes_say_and_nothing_without_one(lite: Api) -> None:
    lite.tenant("ten_a")
    with pytest.raises(openai.AuthenticationError) as caught:
        lite.client("sf-wrong").files.list()
    assert caught.value.code == "invalid_api_key"
    reader = lite.client(lite.key("ten_a", scopes=["files:read"]))
    assert reader.files.list().data == []
    with pytest.raises(openai.PermissionDeniedError, match="files:write"):
        reader.files.create(file=ROWS, purpose="fine-tune")
    for path in ("/v1/safety/admin/tenants", "/v1/safety/admin/audit"):
        assert raw(lite, "GET", path, reader.api_key).status_code == 403
        assert httpx2.get(lite.url + path).status_code == 401


def test_quotas_and_rates_are_429_with_what_to_do(lite: Api) -> None:
    client = lite.tenant("ten_a", max_open_jobs=1, max_storage_bytes=150, requests_per_second=5.0)
    submit(client)
    with pytest.raises(openai.RateLimitError, match="max_open_jobs") as caught:
        submit(client)
    assert caught.value.code == "insufficient_quota"
    with pytest.raises(openai.RateLimitError, match="max_storage_bytes") as too_much:
        client.files.create(file=b"x" * 100, purpose="fine-tune")
    assert too_much.value.code == "insufficient_quota"
    statuses = [raw(lite, "GET", "/v1/files", client.api_key).status_code for _ in range(15)]
    assert (statuses[0], statuses[-1]) == (200, 429)
    assert raw(lite, "GET", "/v1/files", client.api_key).headers["Retry-After"] == "1"


def test_administrators_let_tenants_in_and_every_change_is_in_the_log(api: Api) -> None:
    api.tenant("ten_root")
    root = api.key("ten_root", role="admin")
    where = "/v1/safety/admin"

    def post(path: str, body: dict[str, Any], **headers: str) -> Any:
        answer = raw(api, "POST", where + path, root, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    acme = post("/tenants", {"name": "acme", "reason": "ticket 1"})
    key = post(
        f"/tenants/{acme['id']}/keys",
        {"name": "ci", "reason": "ticket 2"},
        **{"Idempotency-Key": "x"},
    )
    again = post(
        f"/tenants/{acme['id']}/keys",
        {"name": "ci", "reason": "ticket 2"},
        **{"Idempotency-Key": "x"},
    )
    assert again == {**key, "key": None}  # shown once
    client = api.client(key["key"])
    submit(client)
    post(f"/tenants/{acme['id']}", {"reason": "misuse", "suspended": True})
    with pytest.raises(openai.AuthenticationError):
        client.files.list()
    post(f"/tenants/{acme['id']}", {"reason": "settled", "suspended": False})
    rotated = raw(api, "POST", f"/v1/safety/keys/{key['id']}/rotate", key["key"]).json()
    with pytest.raises(openai.AuthenticationError):
        client.files.list()
    assert api.client(rotated["key"]).files.list().data != []
    post(f"/keys/{rotated['id']}/revoke", {"reason": "lost"})
    with pytest.raises(openai.AuthenticationError):
        api.client(rotated["key"]).files.list()
    missing = raw(api, "POST", f"{where}/tenants/{acme['id']}", root, json={"suspended": True})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "reason"
    log = raw(api, "GET", f"{where}/audit", root).json()["data"]
    assert [e["action"] for e in log] == [
        *("tenant.create", "key.create", "file.create", "job.create", "tenant.change"),
        *("tenant.change", "key.rotate", "key.revoke"),
    ]
    assert log[4]["reason"] == "misuse"
    with api.database.system_read() as session:
        assert verify(entries(session)).entries == len(log)
        secrets = [key["key"].split("-")[2], rotated["key"].split("-")[2]]
        everything = str([dict(e.__dict__) for e in session.scalars(select(AuditEntry))])
    assert not any(secret in everything for secret in secrets)


def _form(*parts: tuple[str, str | None, bytes], end: bool = True) -> tuple[bytes, dict[str, str]]:
    body = b""
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        head = f'--BB\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + (b"--BB--\r\n" if end else b""), {
        "Content-Type": "multipart/form-data; boundary=BB"
    }


PURPOSE = ("purpose", None, b"fine-tune")


@pytest.mark.parametrize(
    ("form", "status"),
    [
        (_form(PURPOSE), 400),
        (_form(("file", "a", b"x")), 400),
        (_form(("purpose", None, b"vision"), ("file", "a", b"x")), 400),
        (_form(PURPOSE, ("file", "a", b"")), 400),
        (_form(PURPOSE, ("file", "a", b"x"), ("file", "b", b"y")), 400),
        (_form(PURPOSE, ("other", None, b"1"), ("file", "a", b"x")), 400),
        (_form(PURPOSE, ("file", "a", b"x"), end=False), 400),
        (_form(PURPOSE, *[(f"n{i}", None, b"") for i in range(9)]), 400),
        (_form(("purpose", None, b"y" * 5000), ("file", "a", b"x")), 400),
        (_form(PURPOSE, ("file", "a", b"x" * ((1 << 20) + 1))), 413),
        ((b"junk", {"Content-Type": "multipart/form-data; boundary=BB"}), 400),
        ((b"junk", {"Content-Type": "multipart/form-data"}), 415),
        ((b"{}", {"Content-Type": "application/json"}), 415),
    ],
)
def test_uploads_that_are_none_leave_nothing(
    lite: Api, form: tuple[bytes, dict[str, str]], status: int
) -> None:
    client = lite.tenant("ten_a")
    body, headers = form
    answer = raw(lite, "POST", "/v1/files", client.api_key, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    _nothing_left(lite)


def _nothing_left(api: Api) -> None:
    with api.database.system_read() as session:
        assert session.scalars(select(File)).all() == []
    assert list(api.services.store.keys("")) == []
    assert api.services.store.sweep(-60) == 0


def test_a_key_changes_itself_and_an_administrators_those_of_its_tenant(lite: Api) -> None:
    own = lite.tenant("ten_a").api_key
    lite.tenant("ten_b")
    others = {}
    with lite.database.system_read() as session:
        for key in session.scalars(select(ApiKey)):
            others[key.prefix] = key.id
    mine = others.pop(own.split("-")[1])
    [theirs] = others.values()
    second = lite.key("ten_a", role="admin")

    def revoke(key_id: str, key: str) -> int:
        return raw(lite, "POST", f"/v1/safety/keys/{key_id}/revoke", key).status_code

    assert revoke(theirs, own) == 403
    assert revoke(theirs, second) == 404
    assert revoke(mine, second) == 200
    assert raw(lite, "GET", "/v1/files", own).status_code == 401


def test_a_name_that_is_a_path_is_only_a_name(lite: Api) -> None:
    client = lite.tenant("ten_a")
    for name, shown in [("../../etc/passwd", "passwd"), ("a\\b\\c.jsonl", "c.jsonl"), ("..", "..")]:
        body, headers = _form(PURPOSE, ("file", name, ROWS))
        answer = raw(lite, "POST", "/v1/files", client.api_key, content=body, headers=headers)
        assert answer.json()["filename"] == shown
        stored = client.files.content(answer.json()["id"]).response.headers
        assert stored["Content-Disposition"] == f"attachment; filename*=UTF-8''{shown}"


def test_an_upload_that_stops_is_given_up_and_one_that_breaks_leaves_nothing(lite: Api) -> None:
    client = lite.tenant("ten_a")
    body, headers = _form(PURPOSE, ("file", "a", b"x" * 1000))
    host, port = lite.url.removeprefix("http://").split(":")
    for hang_up in (False, True):
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Authorization", f"Bearer {client.api_key}")
        connection.putheader("Content-Type", headers["Content-Type"])
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:500])
        if hang_up:
            assert connection.sock is not None
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        else:
            answer = connection.getresponse()
            assert answer.status == 408, answer.read()
    for _ in range(200):  # the server notices a closed connection on its own time
        with lite.database.system_read() as session:
            if not session.scalars(select(File)).all():
                break
        time.sleep(0.02)
    _nothing_left(lite)


def _begun(api: Api, key: str, *framing: str) -> http.client.HTTPConnection:
    """An upload whose file has begun; it reserves room when that has been read."""
    connection = http.client.HTTPConnection(api.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Authorization", f"Bearer {key}")
    connection.putheader("Content-Type", "multipart/form-data; boundary=BB")
    connection.putheader(*framing)
    body = _form(PURPOSE, ("file", "a", b"begins"), end=False)[0]
    connection.endheaders()
    connection.send(b"%x\r\n%b\r\n" % (len(body), body) if "chunked" in framing else body)
    return connection


def _until_stored(api: Api, key: str, wanted: int) -> None:
    """Nothing but looking tells what the server has read."""
    until = time.monotonic() + 60
    while raw(api, "GET", "/v1/safety/usage", key).json()["stored_bytes"] != wanted:
        assert time.monotonic() < until, "that is never what is stored"
        time.sleep(0.02)


def test_an_upload_under_way_has_its_room_reserved_and_one_that_breaks_gives_it_back(
    api: Api,
) -> None:
    client = api.tenant("ten_a", max_storage_bytes=1_000_000)
    first = _begun(api, client.api_key, "Content-Length", "700000")
    _until_stored(api, client.api_key, 700_000)
    with pytest.raises(openai.RateLimitError, match="wait for the uploads") as caught:
        client.files.create(file=b"x" * 400_000, purpose="fine-tune")
    assert caught.value.code == "insufficient_quota"
    assert client.files.create(file=b"x" * 100_000, purpose="fine-tune").bytes == 100_000
    assert first.sock is not None
    first.sock.shutdown(socket.SHUT_RDWR)
    first.close()
    _until_stored(api, client.api_key, 100_000)
    assert client.files.create(file=b"x" * 899_000, purpose="fine-tune").bytes == 899_000
    _until_stored(api, client.api_key, 999_000)


def test_an_upload_of_unknown_length_reserves_what_it_may_have_and_keeps_what_it_has(
    api: Api,
) -> None:
    client = api.tenant("ten_a", max_storage_bytes=1_000_000)
    first = _begun(api, client.api_key, "Transfer-Encoding", "chunked")
    _until_stored(api, client.api_key, 1_000_000)
    with pytest.raises(openai.RateLimitError, match="max_storage_bytes"):
        client.files.create(file=ROWS, purpose="fine-tune")
    first.send(b"6\r\n--BB--\r\n0\r\n\r\n")
    assert json.loads(first.getresponse().read())["bytes"] == len(b"begins")
    assert client.files.create(file=ROWS, purpose="fine-tune").bytes == len(ROWS)
    _until_stored(api, client.api_key, len(b"begins" + ROWS))


def test_an_upload_that_begins_while_another_reserves_its_room_waits_for_it(api: Api) -> None:
    key = api.tenant("ten_a", max_storage_bytes=1000).api_key
    [caller] = authenticate_all(api.database, [key], 1.0)
    assert caller is not None
    waiting = text(
        "SELECT 1 FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )

    def waits() -> bool:
        if api.database.is_sqlite:
            return len(api.database._writers._waiting) > 0
        return bool(api.database.rows(waiting, {}))

    with ThreadPoolExecutor(1) as pool:
        with api.database.tenant("ten_a") as session:
            assert storage_left(session) == 1000
            session.add(file_row("ten_a", "file-1", sha256=None, bytes=900))
            session.flush()
            begun = pool.submit(_announce, api.services, caller, "file-2", 300)
            until = time.monotonic() + 60
            while not begun.done() and not waits():
                assert time.monotonic() < until
                time.sleep(0.01)
        assert begun.result(60)[1] == 100


def test_bodies_are_bounded_whatever_their_headers_say(lite: Api) -> None:
    client = lite.tenant("ten_a")
    path = "/v1/fine_tuning/jobs"
    headers = {"Content-Type": "application/json"}

    def chunks() -> Iterator[bytes]:
        for _ in range(10):
            yield b" " * 60_000

    answer = raw(lite, "POST", path, client.api_key, content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_a_database_that_is_gone_is_503_and_comes_back(lite: Api) -> None:
    client = lite.tenant("ten_a")
    path = Path(str(lite.database.engine.url.database))
    lite.database.close()
    hidden = path.rename(path.with_suffix(".hidden"))
    path.mkdir()
    with pytest.raises(openai.InternalServerError) as caught:
        client.files.list()
    assert caught.value.status_code == 503
    path.rmdir()
    hidden.rename(path)
    assert client.files.list().data == []


def test_a_database_that_hangs_is_503_and_says_when_to_come_again(
    lite: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, writers = lite.tenant("ten_a"), lite.database._writers
    job = submit(client)
    monkeypatch.setattr(writers, "_timeout_s", 0.01)
    path = f"/v1/fine_tuning/jobs/{job.id}/cancel"
    with writers:  # somebody writes and does not end
        answer = raw(lite, "POST", path, client.api_key)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "5")
    assert answer.json()["error"]["code"] == "unavailable"
    pool: Any = lite.database.engine.pool
    monkeypatch.setattr(pool, "_timeout", 0.01)
    with contextlib.ExitStack() as held:
        for _ in range(32):
            held.enter_context(lite.database.engine.connect())
        for path in ("/v1/files", "/healthz"):
            answer = raw(lite, "GET", path, client.api_key)
            assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "5")
    assert raw(lite, "GET", "/healthz", client.api_key).status_code == 200


def test_a_schema_of_another_version_is_503_and_not_looked_up_anew_each_time(
    lite: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def healthz() -> int:
        return httpx2.get(f"{lite.url}/healthz").status_code

    assert healthz() == 200
    with monkeypatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", lambda config: pytest.fail("read again"))
        assert healthz() == 200
    with lite.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'other'")
    assert healthz() == 503


def test_files_are_kept_in_s3_and_an_s3_that_fails_is_503(
    sqlite_url: str, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    settings = Settings(
        home=tmp_path / "home",
        artifacts=f"s3://{bucket}/plane",
        base_models={"tiny": BaseModelOffer(source="tiny")},
    )
    with running_api(database, tmp_path, settings=settings) as api:
        client = api.tenant("ten_a")
        content = bytes(range(256)) * 40_000  # two parts
        file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        assert client.files.content(file.id).read() == content
        assert list(api.services.store.keys("")) == [f"tenants/ten_a/files/{file.id}"]
        client.files.delete(file.id)
        monkeypatch.setattr(api.services.store, "bucket", "no-such-bucket")
        with pytest.raises(openai.InternalServerError) as caught:
            client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        assert caught.value.status_code == 503
        assert client.files.list().data == []
    database.close()


def test_a_file_that_a_job_needs_is_not_deleted(lite: Api) -> None:
    client = lite.tenant("ten_a")
    job = submit(client)
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(job.training_file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(job.training_file).deleted


def test_usage_is_told(lite: Api) -> None:
    client = lite.tenant("ten_a")
    submit(client)
    usage = raw(lite, "GET", "/v1/safety/usage", client.api_key).json()
    assert (usage["stored_bytes"], usage["open_jobs"], usage["gpu_seconds"]) == (len(ROWS), 1, 0.0)
    with lite.database.tenant(str(usage["limits"]["name"])) as session:
        assert session.scalars(select(Tenant)).one().max_open_jobs == 100_000


def test_costs_are_told_in_money_where_there_is_a_price(sqlite_url: str, tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path / "home",
        base_models={"tiny": BaseModelOffer(source="tiny")},
        price=Price(currency="EUR", per_million_tokens=2.0, per_gpu_hour=3.6),
    )
    database = Database(sqlite_url)
    with running_api(database, tmp_path / "home", settings=settings) as api:
        client = api.tenant("ten_a")
        job = submit(client).id
        path = f"/v1/safety/jobs/{job}"
        assert raw(api, "GET", path, client.api_key).json()["cost"] == {
            "currency": "EUR",
            "expected_for_tokens": None,  # nobody has counted them yet
            "incurred": {"tokens": 0.0, "gpu_hours": 0.0, "total": 0.0},
        }
        facts = {
            "validating": {"estimated_tokens": 1_500_000},
            "training": {"trained_tokens": 500_000},
        }
        times = {"slots": 2, "seen": 0, "started_at": 0.0, "ended_at": 500.0}
        with database.system() as session:
            session.get_one(Job, job).facts = facts
            for attempt, stage in enumerate(("screening", "training")):
                row = Stage(job_id=job, tenant_id="ten_a", attempt=attempt, stage=stage, **times)
                session.add(row)
        cost = raw(api, "GET", path, client.api_key).json()["cost"]
        assert cost["expected_for_tokens"] == 3.0
        assert cost["incurred"] == {"tokens": 1.0, "gpu_hours": 1.0, "total": 2.0}
        usage = raw(api, "GET", "/v1/safety/usage", client.api_key).json()
        assert usage["cost"] == {"currency": "EUR", **cost["incurred"]}
    database.close()


def test_without_a_price_only_tokens_and_time_are_told(lite: Api) -> None:
    client = lite.tenant("ten_a")
    job = submit(client).id
    assert raw(lite, "GET", f"/v1/safety/jobs/{job}", client.api_key).json()["cost"] is None
    assert raw(lite, "GET", "/v1/safety/usage", client.api_key).json()["cost"] is None


def test_the_openapi_document_names_every_route_and_the_docs_are_served(lite: Api) -> None:
    document = httpx2.get(f"{lite.url}/openapi.json").json()
    assert {"/v1/files", "/v1/fine_tuning/jobs/{job_id}/events", "/v1/safety/usage"} <= set(
        document["paths"]
    )
    schema = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    assert "multipart/form-data" in schema
    docs = httpx2.get(f"{lite.url}/docs", follow_redirects=True)
    assert (
        docs.status_code == 200 and "default-src 'none'" in docs.headers["content-security-policy"]
    )
    assert all(path in docs.text for path in document["paths"])
    assert 'id="CreateJob"' in docs.text and "http" not in docs.text.replace("HTTP", "")


def test_every_phase_has_a_way_to_its_end() -> None:
    assert all(after(phase, "cancel") == "cancelled" for phase in WAITING)
    for phase in FINAL:
        with pytest.raises(ValueError, match="cannot be"):
            after(phase, "cancel")

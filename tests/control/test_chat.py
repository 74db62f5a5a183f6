"""Chatting with published models under the API's own address, by tenants' keys."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy.exc import TimeoutError as NoTurn
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from cluster.api.app import create_app
from cluster.cli.main import app
from cluster.serving.engine import QueueFull
from cluster.serving.front import FRONT_TOKEN, tokens_comment
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from cluster.state.models import ApiKey, PublishedModel
from safeft.evaluate import generate_greedy
from safeft.models import load_merged, load_tokenizer
from tests.control.chat_world import FRONT, Plane, running_plane, waited
from tests.control.server import Api, running_api, serve
from tests.serving_world import SECRET, TOKEN

USER: Any = [{"role": "user", "content": "What is a cat?"}]
_USED = b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
BRIEF: Any = {"messages": USER, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def plane(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with running_plane(tiny_dir, tmp_path_factory.mktemp("plane")) as made:
        yield made


@pytest.fixture(scope="module")
def acme(plane: Plane) -> openai.OpenAI:
    return plane.api.tenant("ten_acme")


@pytest.fixture(scope="module")
def other(plane: Plane) -> openai.OpenAI:
    return plane.api.tenant("ten_other")


@pytest.fixture(scope="module")
def bot(plane: Plane, acme: openai.OpenAI) -> str:
    """A healthy model of acme's."""
    return plane.serve(acme)


def raw(plane: Plane, key: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(plane.api.url + path, json=body, headers=headers, timeout=120)


def said(chunks: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def usage(plane: Plane, client: openai.OpenAI) -> dict[str, int]:
    plane.api.services.meter.flush()
    headers = {"Authorization": f"Bearer {client.api_key}"}
    found = httpx.get(f"{plane.api.url}/v1/safety/usage", headers=headers).json()
    return dict(found["chat"])


@pytest.fixture
def slowly(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer takes so long that what happens meanwhile is never too late."""
    batch = plane.stack.server._engine._batch
    step = batch.step

    def slow() -> list[int]:
        threading.Event().wait(0.05)
        return step()

    monkeypatch.setattr(batch, "step", slow)


def test_from_upload_to_chat_with_the_official_client(plane: Plane, tiny_dir: Path) -> None:
    client = plane.api.tenant("ten_story")
    model = plane.tune(client, metadata={"on_quarantine": "previous"})

    def refused() -> str | None:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=model, **BRIEF)
        assert caught.value.status_code == 503
        return caught.value.code

    assert refused() == "safety_unknown"  # published, and serving does not know it yet
    plane.registrar.look()
    (record,) = plane.stack.keeper.gate.versions(model)
    assert (record.state, record.on_quarantine) == ("unknown", "previous")
    plane.stack.settle()
    assert refused() == "safety_unknown"  # known, and not probed
    plane.registrar.look()
    assert client.models.retrieve(model).state == "unknown"  # type: ignore[attr-defined]

    plane.stack.clear(model)
    plane.registrar.look()
    assert client.models.retrieve(model).state == "healthy"  # type: ignore[attr-defined]
    asked: Any = {"model": model, "messages": USER, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    tuned = load_merged(tiny_dir, plane.adapters[model])
    (expected,) = generate_greedy(tuned, load_tokenizer(tiny_dir), [USER], max_new_tokens=12)
    assert whole.choices[0].message.content == expected
    assert whole.model == model
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert said(chunks) == expected
    assert all(chunk.usage is None for chunk in chunks)  # nobody asked for it
    text = client.completions.create(model=model, prompt="Once", max_tokens=4, temperature=0)
    assert whole.usage is not None and text.usage is not None
    assert usage(plane, client) == {
        "requests": 3,
        "prompt_tokens": 2 * whole.usage.prompt_tokens + text.usage.prompt_tokens,
        "completion_tokens": _delivered(chunks, whole) + text.usage.completion_tokens,
    }


def _delivered(chunks: list[Any], whole: Any) -> int:
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    return 2 * int(whole.usage.completion_tokens)


def test_safeft_chat_talks_to_the_api_with_a_key(
    plane: Plane, acme: openai.OpenAI, bot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEFT_API_KEY", acme.api_key)
    asked = ["chat", "--url", plane.api.url, "--model", bot, "-m", "What is a cat?", "--json"]
    done = CliRunner().invoke(app, [*asked, "--max-new-tokens", "4"])
    assert json.loads(done.stdout)["answer"], done.exception


def test_the_usage_chunk_is_there_where_it_was_asked_for(plane: Plane, acme: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        acme.chat.completions.create(model="base", **BRIEF, stream=True, stream_options=options)
    )
    assert chunks[-1].usage is not None and chunks[-1].choices == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_another_tenants_model_answers_exactly_like_one_that_does_not_exist(
    plane: Plane, other: openai.OpenAI, bot: str, path: str, stream: bool
) -> None:
    nobodys = "ft:base:ten_acme::000000000000"
    answers = []
    for model in (bot, nobodys):
        found = raw(plane, other.api_key, path, model=model, **BRIEF, stream=stream)
        headers = {k: v for k, v in found.headers.items() if k not in ("date", "content-length")}
        answers.append((found.status_code, headers, found.text.replace(model, "MODEL")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert json.loads(answers[0][2])["error"]["code"] == "model_not_found"
    assert bot not in [model.id for model in other.models.list()]
    assert other.chat.completions.create(model="base", **BRIEF).choices


def test_a_key_is_asked_for_and_needs_its_scope(
    plane: Plane, acme: openai.OpenAI, bot: str
) -> None:
    key = plane.api.key("ten_acme")
    assert raw(plane, key, model=bot, **BRIEF).status_code == 200
    with plane.database.system() as session:
        session.query(ApiKey).filter_by(prefix=key.split("-")[1]).one().revoked_at = 1.0
    for wrong in (key, "sf-none", FRONT, TOKEN):
        found = raw(plane, wrong, model=bot, **BRIEF)
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    reader = plane.api.key("ten_acme", scopes=["models:read"])
    assert raw(plane, reader, model=bot, **BRIEF).json()["error"]["code"] == "missing_scope"


def test_rate_and_tokens_are_limited_for_each_tenant(plane: Plane, acme: openai.OpenAI) -> None:
    slow = plane.api.tenant("ten_slow", requests_per_second=0.001)
    assert slow.chat.completions.create(model="base", **BRIEF)
    with pytest.raises(openai.RateLimitError) as caught:
        slow.chat.completions.create(model="base", **BRIEF)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0
    poor = plane.api.tenant("ten_poor", max_chat_tokens=1)
    assert poor.chat.completions.create(model="base", **BRIEF)  # nobody knows how long it will be
    for _ in range(2):  # counted before it is written, and after
        with pytest.raises(openai.RateLimitError, match="max_chat_tokens") as caught:
            poor.chat.completions.create(model="base", **BRIEF)
        assert caught.value.code == "insufficient_quota"
        plane.api.services.meter.flush()
    assert acme.chat.completions.create(model="base", **BRIEF)


def test_the_gates_and_the_queues_refusals_reach_the_client_as_they_are(
    plane: Plane, acme: openai.OpenAI, bot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = plane.stack.keeper.decide
    plane.stack.do(decide("quarantine", bot, "ann", "reported by a user"))
    plane.stack.settle()
    try:
        found = raw(plane, acme.api_key, model=bot, **BRIEF)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "safety_quarantined")
        assert found.headers["x-should-retry"] == "false"
        assert "reported by a user" in found.text
        # A tenant that knows the prober's words gets no further with them.
        weights = plane.stack.keeper.gate.versions(bot)[-1].weights
        probe = {"x-safeft-probe-secret": SECRET, "x-safeft-probe-weights": weights}
        sly = acme.with_options(default_headers=probe, max_retries=0)
        with pytest.raises(openai.InternalServerError, match="quarantined"):
            sly.chat.completions.create(model=bot, **BRIEF)
        assert acme.chat.completions.create(model="base", **BRIEF)
        plane.registrar.look()
        assert acme.models.retrieve(bot).state == "quarantined"  # type: ignore[attr-defined]
        for job in acme.fine_tuning.jobs.list():  # the restoration that it asked for
            if job.finished_at is None:
                acme.fine_tuning.jobs.cancel(job.id)
    finally:
        plane.stack.do(decide("release", bot, "ann", "it was nothing"))
        plane.stack.settle()
        plane.registrar.look()  # the restoration that was asked for is not needed any more

    def full(*_: object) -> None:
        raise QueueFull(20, 7)

    monkeypatch.setattr(plane.stack.server._engine, "submit", full)
    for stream in (False, True):
        found = raw(plane, acme.api_key, model=bot, **BRIEF, stream=stream)
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert found.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(
    plane: Plane, acme: openai.OpenAI, changed: dict[str, Any], param: str
) -> None:
    found = raw(plane, acme.api_key, **{"model": "base", **BRIEF, **changed})
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert found.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b"[" * 100_000, 400), (b'{"model": "\\ud800"}', 404)],
)
def test_a_body_that_makes_no_sense_is_told_so(
    plane: Plane, acme: openai.OpenAI, content: bytes, status: int
) -> None:
    found = httpx.post(
        f"{plane.api.url}/v1/chat/completions",
        content=content,
        headers={"Authorization": f"Bearer {acme.api_key}", "Content-Type": "application/json"},
    )
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_not_served_and_a_pool_that_does_not_answer_are_told_apart(
    plane: Plane, acme: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        acme.chat.completions.create(model="off", **BRIEF)
    assert missing.value.code == "model_not_served"
    with pytest.raises(openai.InternalServerError) as down:
        acme.chat.completions.create(model="gone", **BRIEF)
    assert (down.value.status_code, down.value.code) == (503, "serving_unavailable")
    assert int(down.value.response.headers["retry-after"]) > 0
    state = plane.settings.serving_state("gone")
    state.mkdir()
    (state / FRONT_TOKEN).write_text(FRONT)  # it ran once, and is down
    with pytest.raises(openai.InternalServerError) as down:
        acme.chat.completions.create(model="gone", **BRIEF)
    assert (down.value.status_code, down.value.code) == (503, "serving_unavailable")


def test_a_pool_that_does_not_know_us_is_our_problem_and_not_the_tenants(
    plane: Plane, acme: openai.OpenAI
) -> None:
    token = plane.settings.serving_state("base") / FRONT_TOKEN
    token.write_text("another")
    try:
        found = raw(plane, acme.api_key, model="base", **BRIEF)
    finally:
        token.write_text(FRONT)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "serving_unavailable")


def test_nobody_gets_past_the_front(plane: Plane, acme: openai.OpenAI) -> None:
    url = plane.stack.url
    for headers in ({}, {"Authorization": f"Bearer {acme.api_key}"}, {"Authorization": "Bearer x"}):
        for path in ("/v1/models", "/admin/models", "/nowhere"):
            found = httpx.get(url + path, headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        asked = httpx.post(f"{url}/v1/chat/completions", content=b"{", headers=headers)
        assert asked.status_code == 401
    front = {"Authorization": f"Bearer {FRONT}"}
    assert httpx.get(f"{url}/v1/models", headers=front).status_code == 200
    assert httpx.get(f"{url}/admin/models", headers=front).status_code == 401
    administrator = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{url}/admin/models", headers=administrator).status_code == 200
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_client_that_leaves_in_mid_stream_frees_its_row_and_pays_for_what_there_was(
    plane: Plane, acme: openai.OpenAI, slowly: None
) -> None:
    before = usage(plane, acme)
    body = {"model": "base", "messages": USER, "max_tokens": 450, "temperature": 0, "stream": True}
    headers = {"Authorization": f"Bearer {acme.api_key}"}
    url = f"{plane.api.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
        for line in response.iter_lines():
            if '"content": "' in line and '"content": ""' not in line:
                break
    engine = plane.stack.server._engine
    waited(lambda: engine.stats().running == engine.stats().waiting == 0)
    waited(lambda: usage(plane, acme)["requests"] == before["requests"] + 1)
    after = usage(plane, acme)
    assert 0 < after["completion_tokens"] - before["completion_tokens"] < 450
    assert after["prompt_tokens"] > before["prompt_tokens"]


def test_deleting_a_model_ends_it_everywhere(
    plane: Plane, acme: openai.OpenAI, slowly: None
) -> None:
    model = plane.serve(acme)
    asked: Any = {"model": model, "messages": USER, "max_tokens": 450, "temperature": 0}
    stream = acme.chat.completions.create(**asked, stream=True)
    next(stream)
    acme.models.delete(model)
    with pytest.raises(openai.NotFoundError) as caught:
        acme.chat.completions.create(**asked)
    assert caught.value.code == "model_not_found"
    plane.registrar.look()
    assert plane.stack.keeper.gate.versions(model) == []
    plane.stack.settle()
    with pytest.raises(openai.APIError, match="does not exist"):  # what was under way ends, too
        list(stream)
    plane.registrar.look()
    assert plane.stack.keeper.gate.versions(model) == []


def test_an_adapter_that_cannot_be_fetched_is_unavailable_and_its_neighbours_are_not(
    plane: Plane, acme: openai.OpenAI, bot: str
) -> None:
    model = plane.serve(acme)  # never asked by a tenant: no replica has it in memory
    shutil.rmtree(plane.home / "disk-cache")
    objects = plane.home / "artifacts" / "objects"
    objects.rename(objects.with_name("away"))
    try:
        for stream in (False, True):
            found = raw(plane, acme.api_key, model=model, **BRIEF, stream=stream)
            error = found.json()["error"]
            assert (found.status_code, error["code"]) == (503, "model_unavailable")
            assert int(found.headers["retry-after"]) > 0
            assert str(plane.home) not in found.text
        assert acme.chat.completions.create(model="base", **BRIEF)
    finally:
        objects.with_name("away").rename(objects)
    assert acme.chat.completions.create(model=model, **BRIEF)  # tried again by the next request


def test_two_models_of_the_same_weights_outlive_each_other(
    plane: Plane, acme: openai.OpenAI
) -> None:
    models = []
    for _ in range(2):
        models.append(plane.serve(acme))
        plane.adapters.popitem()  # the next one has the same seed
    weights = {plane.stack.keeper.gate.versions(model)[-1].weights for model in models}
    assert len(weights) == 1
    acme.models.delete(models[1])
    plane.registrar.look()
    shutil.rmtree(plane.home / "disk-cache")
    (location,) = (plane.stack.do(plane.stack.keeper.location(w)) for w in weights)
    assert plane.stack.keeper._published.fetch(location).is_dir()


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "ft:base:somebody::else"},
        {"base_weights": "1" * 64},
        {"files": {"adapter_config.json": "0" * 64, "adapter_model.safetensors": "0" * 64}},
        {"files": {}},
    ],
)
def test_what_is_not_as_it_was_published_is_not_registered_and_the_rest_is(
    plane: Plane, acme: openai.OpenAI, changed: dict[str, Any]
) -> None:
    plane.changed = changed
    try:
        bad = plane.tune(acme)
    finally:
        plane.changed = {}
    # The name that the job has, whatever the statement says.
    with plane.database.system_read() as session:
        ids = {row.id for row in session.query(PublishedModel)}
    good = plane.tune(acme)
    plane.registrar.look()
    served = {record.model for record in plane.stack.keeper.gate.records()}
    assert good in served and bad not in served and bad in ids
    with pytest.raises(openai.InternalServerError) as caught:
        acme.chat.completions.create(model=bad, **BRIEF)
    assert caught.value.code == "safety_unknown"
    acme.models.delete(bad)


def test_a_signature_of_somebody_else_is_not_believed(plane: Plane, acme: openai.OpenAI) -> None:
    model = plane.tune(acme)
    with plane.database.system() as session:
        row = session.get_one(PublishedModel, model)
        statement = row.provenance["statement"].replace(
            '"code_version":"test"', '"code_version":"x"'
        )
        row.provenance = {**row.provenance, "statement": statement}
    plane.registrar.look()
    assert plane.stack.keeper.gate.versions(model) == []
    acme.models.delete(model)


def test_a_whole_model_is_told_to_be_not_served(plane: Plane, acme: openai.OpenAI) -> None:
    model = plane.tune(acme)
    with plane.database.system() as session:
        session.get_one(PublishedModel, model).kind = "model"
    plane.registrar.look()
    assert acme.models.retrieve(model).state == "not_served"  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as caught:
        acme.chat.completions.create(model=model, **BRIEF)
    assert caught.value.code == "model_not_served"


def test_a_restarted_registrar_changes_nothing_and_a_pool_that_forgot_gets_everything_again(
    plane: Plane, bot: str
) -> None:
    before = plane.stack.keeper.gate.events()
    plane.make_registrar().look()
    assert plane.stack.keeper.gate.events() == before
    plane.stack.do(plane.stack.keeper.decide("retire", bot, "ann", "a drill"))
    plane.make_registrar().look()
    (record,) = plane.stack.keeper.gate.versions(bot)
    assert record.state == "unknown"  # and has to be probed again
    plane.stack.clear(bot)


def test_a_quarantined_model_that_was_removed_from_its_pool_comes_back_quarantined(
    plane: Plane, acme: openai.OpenAI
) -> None:
    model, decide = plane.serve(acme), plane.stack.keeper.decide
    plane.stack.do(decide("quarantine", model, "ann", "reported by a user"))
    plane.stack.do(decide("retire", model, "ann", "nobody needs it"))
    plane.make_registrar().look()
    (record,) = plane.stack.keeper.gate.versions(model)
    assert (record.state, record.condemned) == ("quarantined", True)
    plane.stack.settle()
    with pytest.raises(openai.InternalServerError, match="reported by a user"):
        acme.chat.completions.create(model=model, **BRIEF)
    acme.models.delete(model)  # which is the way
    plane.registrar.look()
    assert plane.stack.keeper.gate.versions(model) == []


class Pool:
    """A serving pool of which a test plays what it says. An ASGI application."""

    def __init__(self) -> None:
        self.left, self.asked, self.answer = (threading.Event() for _ in range(3))
        self.blocks: list[bytes] = []
        self.pause_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        self.asked.set()
        leaving = asyncio.create_task(self._left(receive))
        if self.blocks:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        for block in self.blocks:
            await send({"type": "http.response.body", "body": block, "more_body": True})
            await asyncio.sleep(self.pause_s)
            if leaving.done():
                return
        if self.blocks:
            raise RuntimeError("the pool is killed here")
        while not leaving.done():
            if self.answer.is_set():
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": _USED})
                return
            await asyncio.sleep(0.01)

    async def _left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def front(pool: Pool, sqlite_url: str, tmp_path: Path) -> Iterator[Api]:
    """An API before that pool."""
    database = Database(sqlite_url)
    app: Any = pool
    (tmp_path / "serving" / "base").mkdir(parents=True)
    (tmp_path / "serving" / "base" / FRONT_TOKEN).write_text(FRONT)
    with serve(app) as url:
        settings = Settings(
            home=tmp_path, base_models={"base": BaseModelOffer(source="unused", serving=url)}
        )
        with running_api(database, tmp_path, settings=settings) as api:
            yield api
    database.close()


def raw_request(front: Api, key: str, content: bytes) -> bytes:
    """A request for a chat, to be sent by hand."""
    address = httpx.URL(front.url).netloc.decode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {address}",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def connected(front: Api) -> socket.socket:
    url = httpx.URL(front.url)
    return socket.create_connection((url.host, url.port or 80))


def test_a_client_that_leaves_before_the_answer_is_told_to_the_pool(front: Api, pool: Pool) -> None:
    content = json.dumps({"model": "base", **BRIEF}).encode()
    with connected(front) as client:
        client.sendall(raw_request(front, front.tenant("ten_a").api_key, content))
        assert pool.asked.wait(60)
    assert pool.left.wait(60)


@pytest.mark.parametrize("end", ["left", "answered"])
def test_a_tenants_answers_are_bounded_and_each_is_given_back_however_it_ends(
    front: Api, pool: Pool, end: str
) -> None:
    chats = front.services.chats
    chats.most = 3
    key, other = front.tenant("ten_a").api_key, front.tenant("ten_b").api_key

    def post(key: str, n: Any) -> httpx.Response:
        headers, body = {"Authorization": f"Bearer {key}"}, {"model": "base", **BRIEF, "n": n}
        return httpx.post(f"{front.url}/v1/chat/completions", json=body, headers=headers)

    with connected(front) as client:
        content = json.dumps({"model": "base", **BRIEF, "n": 2}).encode()
        client.sendall(raw_request(front, key, content))
        assert pool.asked.wait(60) and len(chats) == 2
        if end == "answered":
            pool.answer.set()
            assert client.recv(4)
    waited(lambda: not chats)  # the server notices a closed connection on its own time
    pool.answer.set()
    with chats.held("ten_a", 2):
        for n in (2, "2", 2.0, 128):  # as the pool would read it
            found = post(key, n)
            assert (found.status_code, found.headers["retry-after"]) == (429, "5")
            assert found.json()["error"]["code"] == "too_many_answers"
        for n in (1, True, None, "many"):  # one, or the pool's to refuse
            assert post(key, n).status_code == 200
        assert post(other, 2).status_code == 200
    waited(lambda: not chats)


def test_a_client_that_leaves_before_its_request_is_whole_is_no_fault_of_the_server(
    front: Api, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a server, whose time of noticing is nobody's: what it then calls, and with what."""
    key, answered = front.tenant("ten_a").api_key, []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode()), (b"content-length", b"100")],
    }

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answered.append(message)

    asyncio.run(create_app(front.services)(scope, gone, send))  # would raise what is not handled
    assert answered[0]["status"] == 400 and not pool.asked.is_set()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_pool_that_dies_in_mid_stream_is_told_and_what_there_was_is_counted(
    front: Api, pool: Pool
) -> None:
    chunk = 'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"base",'
    chunk += '"choices":[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}\n\n'
    sent = (tokens_comment(5, 1) + chunk + tokens_comment(5, 2) + chunk).encode()
    pool.blocks = [sent[:7], sent[7:90], sent[90:]]  # cut anywhere
    client = front.tenant("ten_a")
    stream = client.chat.completions.create(model="base", messages=USER, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:
        for piece in stream:
            text += piece.choices[0].delta.content or ""
    assert text == "HelloHello"
    assert caught.value.code == "engine_unavailable"
    front.services.meter.flush()
    headers = {"Authorization": f"Bearer {client.api_key}"}
    found = httpx.get(f"{front.url}/v1/safety/usage", headers=headers).json()["chat"]
    assert found == {"requests": 1, "prompt_tokens": 5, "completion_tokens": 2}


def streamed(front: Api, key: str, at_the_first: Callable[[], object]) -> list[str]:
    """The lines of a stream, during which something happens."""
    lines: list[str] = []
    with httpx.stream(
        "POST",
        f"{front.url}/v1/chat/completions",
        json={"model": "base", **BRIEF, "stream": True},
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    ) as response:
        for line in response.iter_lines():
            if not lines:
                at_the_first()
            lines.append(line)
    return lines


def test_a_stream_is_told_that_the_database_gives_nobody_a_turn(
    front: Api, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.blocks, pool.pause_s = [b'data: {"choices":[]}\n\n'] * 1000, 0.3
    key = front.tenant("ten_a").api_key

    def hangs(shown: object) -> list[Any]:
        raise NoTurn("no connection came free")

    lines = streamed(
        front, key, lambda: monkeypatch.setattr(front.services.callers, "_serve", hangs)
    )
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "unavailable"


def test_a_key_that_is_revoked_reads_no_more_of_a_stream(front: Api, pool: Pool) -> None:
    pool.blocks, pool.pause_s = [b'data: {"choices":[]}\n\n'] * 1000, 0.3
    key = front.tenant("ten_a").api_key

    def revoke() -> None:
        with front.database.system() as session:
            session.query(ApiKey).one().revoked_at = 1.0

    lines = streamed(front, key, revoke)
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    assert pool.left.wait(60)

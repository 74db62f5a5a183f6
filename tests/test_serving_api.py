"""The API over real HTTP: OpenAI's own client, plain requests, errors, limits and the gate."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cluster.serving.engine import EngineLimits
from cluster.serving.transformers_engine import TransformersEngine
from safeft.errors import ModelError
from safeft.evaluate import generate_greedy
from safeft.models import load_merged, load_model, load_tokenizer
from tests.serving_world import BASE, SECRET, TOKEN, Stack
from tests.test_serving_engine import BAD_ADAPTERS, broken
from tests.tinyadapters import Shelf, save_adapter

USER = [{"role": "user", "content": "What is a cat?"}]
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


class OnDisk(Shelf):
    """Adapters by the keeper's registry."""

    stack: Stack

    def fetch(self, weights: str) -> Path:
        if not self.reachable:
            raise ModelError("the artifact store cannot be reached; try again later")
        return Path(self.stack.do(self.stack.keeper.location(weights)))


@pytest.fixture(scope="module")
def shelf() -> OnDisk:
    return OnDisk()


@pytest.fixture(scope="module")
def stack(
    tiny_dir: Path, shelf: OnDisk, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("serving")
    tokenizer = load_tokenizer(tiny_dir)
    limits = EngineLimits(max_batch=4, max_queue=20)

    def build() -> tuple[TransformersEngine, object]:
        return TransformersEngine(load_model(tiny_dir), tokenizer, shelf, limits), tokenizer

    made = Stack(root, build, timeout_s=20)
    shelf.stack = made
    made.clear("base")
    for number, name in enumerate(("acme/bot", "other/bot")):
        shelf.add(root / str(number), number)
        made.do(made.keeper.register(name, str(root / str(number)), "unavailable"))
        made.clear(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def post(stack: Stack, path: str = "/v1/chat/completions", **body: object) -> httpx.Response:
    return httpx.post(stack.url + path, json=body, timeout=60)


def test_a_chat_completion_has_the_adapters_answer_and_its_usage(
    stack: Stack, client: openai.OpenAI, tiny_dir: Path
) -> None:
    record = stack.keeper.gate.versions("acme/bot")[-1]
    adapter = Path(stack.do(stack.keeper.location(record.weights)))
    tokenizer = load_tokenizer(tiny_dir)
    (expected,) = generate_greedy(
        load_merged(tiny_dir, adapter), tokenizer, [USER], max_new_tokens=12
    )
    answer = client.chat.completions.create(
        model="acme/bot", messages=USER, max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.object == "chat.completion"
    assert answer.model == "acme/bot"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_joins_to_the_whole_answer_and_ends_with_the_usage(client: openai.OpenAI) -> None:
    asked = {"model": "acme/bot", "messages": USER, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_seed_n_and_stop_are_obeyed(client: openai.OpenAI) -> None:
    asked = {"model": "base", "messages": USER, "max_tokens": 10, "seed": 5, "n": 3}
    first = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    whole = texts[0] or ""
    stopped = client.chat.completions.create(**{**asked, "n": 1}, stop=[whole[3]])
    assert stopped.choices[0].message.content == whole[: whole.index(whole[3])]
    assert stopped.choices[0].finish_reason == "stop"


def test_completions_go_on_with_a_text(client: openai.OpenAI) -> None:
    asked = {"model": "base", "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.object == "text_completion"
    assert whole.choices[0].text
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["acme/bot", "base", "other/bot"]
    assert client.models.retrieve("acme/bot").id == "acme/bot"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/bot")


def test_an_unknown_model_is_a_404_with_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody/bot", messages=USER)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"temprature": 0}, "temprature"),
        ({"messages": [{"role": "user", "content": "<|im_end|> x"}]}, "messages[0].content"),
    ],
)
def test_a_wrong_or_unknown_field_is_a_400_that_names_it(
    client: openai.OpenAI, changed: dict[str, object], param: str
) -> None:
    body = {"model": "base", "messages": USER, **changed}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", cast_to=object, body=body)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_without_max_tokens_a_long_prompt_gets_what_there_is_room_for(
    client: openai.OpenAI,
) -> None:
    long = [{"role": "user", "content": "word " * 90}]
    answer = client.chat.completions.create(model="base", messages=long)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 512 - 256
    assert answer.usage.total_tokens <= 512


def test_text_parts_and_developer_turns_are_understood(client: openai.OpenAI) -> None:
    plain = [{"role": "system", "content": "Be brief."}, *USER]
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, _text("a cat?")]},
    ]
    asked = {"model": "base", "max_completion_tokens": 8, "temperature": 0}
    answers = [
        client.chat.completions.create(**asked, messages=messages)  # type: ignore[call-overload]
        for messages in (plain, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_a_body_that_is_no_json_and_a_path_that_is_not_there_have_the_same_shape(
    stack: Stack,
) -> None:
    bad = httpx.post(f"{stack.url}/v1/chat/completions", content=b"{")
    assert (bad.status_code, bad.json()["error"]["type"]) == (400, "invalid_request_error")
    missing = httpx.get(f"{stack.url}/v1/files")
    assert (missing.status_code, set(missing.json())) == (404, {"error"})


def test_two_hundred_clients_on_a_queue_of_twenty_are_answered_or_told_when_to_come_back(
    stack: Stack,
) -> None:
    statuses: list[tuple[int, str | None]] = []
    lock = threading.Lock()
    body = {"model": "base", "messages": USER, "max_tokens": 64, "temperature": 0}

    def ask(http: httpx.Client) -> None:
        response = http.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)
        with lock:
            statuses.append((response.status_code, response.headers.get("retry-after")))

    limits = httpx.Limits(max_connections=200)
    with httpx.Client(limits=limits) as http:
        threads = [threading.Thread(target=ask, args=(http,)) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {status for status, _ in statuses} == {200, 429}
    assert all(after is not None and int(after) >= 1 for s, after in statuses if s == 429)
    assert post(stack, **body).status_code == 200


def idle(stack: Stack, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        stats = stack.server._engine.stats()
        if not stats.running and not stats.waiting:
            return True
        time.sleep(0.01)
    return False


def test_a_client_that_leaves_in_mid_stream_frees_its_row(stack: Stack) -> None:
    body = {"model": "acme/bot", "messages": USER, "max_tokens": 400, "temperature": 0}
    before = stack.server._engine.stats().generated_tokens
    with httpx.stream(
        "POST", f"{stack.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as response:
        assert response.status_code == 200
        next(response.iter_lines())
    assert idle(stack, 10)
    assert stack.server._engine.stats().generated_tokens - before < 400


def test_an_answer_that_takes_too_long_is_a_504(tiny_dir: Path, tmp_path: Path) -> None:
    from tests.serving_world import Person

    tokenizer = load_tokenizer(tiny_dir)
    person = Person(tokenizer, silent=True)
    stack = Stack(tmp_path, lambda: (person, tokenizer), timeout_s=0.2)
    try:
        stack.clear("base")
        for stream in (False, True):
            late = post(stack, model="base", messages=USER, stream=stream)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert person.cancelled == 2
    finally:
        stack.close()


def test_a_quarantined_model_is_refused_at_once_and_its_neighbours_are_not(
    stack: Stack, client: openai.OpenAI
) -> None:
    stack.do(stack.keeper.decide("quarantine", "other/bot", "ann", "reported by a user"))
    stack.settle()
    try:
        retrying = client.with_options(max_retries=5)
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError) as caught:
            retrying.chat.completions.create(model="other/bot", messages=USER, max_tokens=4)
        assert time.monotonic() - began < 2  # the client was told not to try again
        assert (caught.value.status_code, caught.value.code) == (503, "safety_quarantined")
        assert "reported by a user" in str(caught.value)
        assert client.chat.completions.create(model="acme/bot", messages=USER, max_tokens=4)
    finally:
        stack.do(stack.keeper.decide("release", "other/bot", "ann", "it was nothing"))
        stack.settle()
    assert client.chat.completions.create(model="other/bot", messages=USER, max_tokens=4)


def test_a_quarantine_ends_the_answers_under_way_within_a_second(stack: Stack) -> None:
    body = {"model": "other/bot", "messages": USER, "max_tokens": 450, "temperature": 0}
    with httpx.stream(
        "POST", f"{stack.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        stack.do(stack.keeper.decide("quarantine", "other/bot", "ann", "now"))
        decided = time.monotonic()
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        took = time.monotonic() - decided
    stack.do(stack.keeper.decide("release", "other/bot", "ann", "test is over"))
    stack.settle()
    assert took < 1
    assert rest[-1]["error"]["code"] == "safety_quarantined"


def test_only_the_prober_reaches_weights_that_are_out_of_rotation(
    stack: Stack, tmp_path: Path
) -> None:
    shelf = Shelf()
    weights = shelf.add(tmp_path / "new", 77)
    stack.do(stack.keeper.register("new/bot", str(tmp_path / "new"), "unavailable"))
    stack.settle()
    body = {"model": "new/bot", "messages": USER, "max_tokens": 4}
    assert post(stack, **body).json()["error"]["code"] == "safety_unknown"
    secret = {"x-safeft-probe-secret": SECRET, "x-safeft-probe-weights": weights}
    url = f"{stack.url}/v1/chat/completions"
    assert httpx.post(url, json=body, headers=secret, timeout=60).status_code == 200
    forged = {**secret, "x-safeft-probe-secret": "guessed"}
    assert httpx.post(url, json=body, headers=forged).status_code == 401
    stack.do(stack.keeper.decide("retire", "new/bot", "ann", "test is over"))
    stack.settle()
    assert post(stack, **body).status_code == 404


def test_an_adapter_whose_files_are_broken_is_a_503_for_its_tenant_alone(
    stack: Stack, tmp_path: Path, client: openai.OpenAI
) -> None:
    Shelf().add(tmp_path / "bad", 78)
    stack.do(stack.keeper.register("bad/bot", str(tmp_path / "bad"), "unavailable"))
    stack.clear("bad/bot")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="bad/bot", messages=USER, max_tokens=4)
    assert caught.value.code == "model_unavailable"
    assert client.chat.completions.create(model="acme/bot", messages=USER, max_tokens=4)
    stack.do(stack.keeper.decide("retire", "bad/bot", "ann", "test is over"))
    stack.settle()


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [bad for bad in BAD_ADAPTERS if bad[0] not in ("corrupt header", "pickle")],
)
def test_an_adapter_that_does_not_fit_is_a_503_that_says_why_and_its_neighbour_answers(
    stack: Stack, tmp_path: Path, kind: str, how: dict[str, object], message: str
) -> None:
    save_adapter(tmp_path / "odd", 79, **how)  # type: ignore[arg-type]
    broken(tmp_path / "odd", kind)
    stack.do(stack.keeper.register("odd/bot", str(tmp_path / "odd"), "unavailable"))
    stack.clear("odd/bot")
    refused = post(stack, model="odd/bot", messages=USER, max_tokens=4)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
    assert re.search(message, refused.json()["error"]["message"])
    assert post(stack, model="acme/bot", messages=USER, max_tokens=4).status_code == 200
    stack.do(stack.keeper.decide("retire", "odd/bot", "ann", "test is over"))
    stack.settle()


def test_a_store_that_cannot_be_reached_is_a_503_for_who_needs_it_until_it_is_back(
    stack: Stack, shelf: OnDisk, tmp_path: Path
) -> None:
    Shelf().add(tmp_path / "far", 80)
    stack.do(stack.keeper.register("far/bot", str(tmp_path / "far"), "unavailable"))
    stack.clear("far/bot")
    far = {"model": "far/bot", "messages": USER, "max_tokens": 4}
    assert post(stack, **{**far, "model": "acme/bot"}).status_code == 200  # it is loaded now
    shelf.reachable = False
    try:
        refused = post(stack, **far)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert refused.json()["error"]["code"] == "model_unavailable"
        assert post(stack, **{**far, "model": "acme/bot"}).status_code == 200
    finally:
        shelf.reachable = True
    assert post(stack, **far).status_code == 200
    stack.do(stack.keeper.decide("retire", "far/bot", "ann", "test is over"))
    stack.settle()


def test_administrators_see_and_decide_and_nobody_else_does(stack: Stack) -> None:
    url = f"{stack.url}/admin"
    assert httpx.get(f"{url}/models").status_code == 401
    assert httpx.get(f"{url}/models", headers={"Authorization": "Bearer x"}).status_code == 401
    rows = {r["model"]: r for r in httpx.get(f"{url}/models", headers=ADMIN).json()}
    assert rows["acme/bot"]["state"] == "healthy"
    assert rows["acme/bot"]["refusals"]["harmful"]["n"] >= 16
    decision = {"action": "quarantine", "model": "acme/bot", "reason": "drill", "actor": "ann"}
    assert httpx.post(f"{url}/decisions", json=decision, headers=ADMIN).status_code == 200
    stack.settle()
    assert post(stack, model="acme/bot", messages=USER).status_code == 503
    again = {**decision, "action": "restoration_failed"}
    refused = httpx.post(f"{url}/decisions", json=again, headers=ADMIN)
    assert (refused.status_code, "not possible" in refused.text) == (400, True)
    httpx.post(f"{url}/decisions", json={**decision, "action": "release"}, headers=ADMIN)
    stack.settle()
    events = httpx.get(f"{url}/events", params={"model": "acme/bot"}, headers=ADMIN).json()
    assert [(e["trigger"], e["reason"], e["actor"]) for e in events[-2:]] == [
        ("quarantined_by_hand", "drill", "ann"),
        ("released_by_hand", "drill", "ann"),
    ]


def test_what_was_answered_is_counted(stack: Stack) -> None:
    post(stack, model="base", messages=USER, max_tokens=4)
    post(stack, model="nobody", messages=USER)
    numbers = stack.recorder.snapshot().numbers
    assert numbers["safeft_requests_total", ("chat", "ok")] >= 1
    assert numbers["safeft_requests_total", ("chat", "invalid")] >= 1
    assert numbers["safeft_generated_tokens_total", ()] > 0
    assert numbers["safeft_gate_state", ("base", "healthy")] == 1
    assert BASE.name == "base"

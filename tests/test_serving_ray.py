"""The whole pool on Ray: official client, prober, gate, metrics, and what happens to the killed."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import ray
from safetensors.torch import load_file, save_file

from cluster.controller.actors import ActorRunner
from cluster.controller.service import push_to_pool
from cluster.gate.policy import Policy
from cluster.metrics import Recorder
from cluster.serving import actors
from cluster.serving.client import Admin, Refused
from cluster.serving.engine import EngineLimits
from cluster.serving.pool import Pool, PoolConfig, PoolError, running_pool, token
from safeft.models import load_tokenizer
from tests.sharedray import SharedRay
from tests.tinyadapters import save_adapter

USER = [{"role": "user", "content": "What is a cat?"}]
#: Positions of the served model: an answer may be so long that no machine is done with it before a
#: test is.
ROOM = 100_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: Callable[[], bool], within_s: float = 180.0) -> None:
    """Fail unless `what` becomes true; what a part says that restarts counts as not yet."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if what():
                return
        except (httpx.HTTPError, openai.APIConnectionError, openai.InternalServerError, Refused):
            pass
        time.sleep(0.1)
    pytest.fail(f"not within {within_s:.0f} s")


@pytest.fixture(scope="module")
def pool(
    tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory, shared_ray: SharedRay
) -> Iterator[Pool]:
    base = tmp_path_factory.mktemp("roomy") / "base"
    shutil.copytree(tiny_dir, base)
    file = base / "config.json"
    other = {"max_position_embeddings": ROOM, "tie_word_embeddings": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), **other}))
    # A head that never likes the end of a turn best: a greedy answer goes on until it is stopped.
    weights = load_file(base / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[load_tokenizer(base).eos_token_id] = 0
    save_file({**weights, "lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    config = PoolConfig(
        policy=Policy(),
        base=str(base),
        name="base",
        state=tmp_path_factory.mktemp("state"),
        port=free_port(),
        metrics_port=0,
        probe_every_s=3600,
        limits=EngineLimits(max_batch=4, max_queue=16),
    )
    shared_ray.start()
    with running_pool(config) as made:
        yield made


@pytest.fixture(scope="module")
def admin(pool: Pool) -> Admin:
    return Admin(pool.url, token(pool.state / "admin-token"))


@pytest.fixture(scope="module")
def client(pool: Pool) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0, timeout=60)


def row(admin: Admin, model: str) -> dict[str, object]:
    return next(r for r in reversed(admin.get("models")) if r["model"] == model)


def release(admin: Admin, model: str) -> None:
    """A random model refuses nothing: the prober takes it out, a person puts it back."""
    eventually(lambda: row(admin, model)["state"] == "quarantined")
    admin.post("decisions", action="release", model=model, reason="a test's", actor="pytest")


def answers(client: openai.OpenAI, model: str) -> bool:
    return bool(client.chat.completions.create(model=model, messages=USER, max_tokens=4).choices)


@pytest.fixture(scope="module")
def served(pool: Pool, admin: Admin, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters and the base, all of them released."""
    names = ["acme/bot", "other/bot"]
    for seed, name in enumerate(names):
        directory = tmp_path_factory.mktemp("adapter") / "a"
        save_adapter(directory, seed)
        admin.post("models", model=name, adapter=str(directory), on_quarantine="unavailable")
    for name in ["base", *names]:
        release(admin, name)
    return ["base", *names]


def test_the_prober_takes_a_model_out_that_answers_everything_and_a_person_puts_it_back(
    pool: Pool, admin: Admin, client: openai.OpenAI, served: list[str]
) -> None:
    triggers = [event["trigger"] for event in admin.get("events", model="acme/bot")]
    assert triggers == ["registered", "asked", "refusals_dropped", "released_by_hand"]
    for name in served:
        eventually(lambda name=name: answers(client, name))


def test_the_official_client_streams_through_ray(client: openai.OpenAI, served: list[str]) -> None:
    asked = {"model": "acme/bot", "messages": USER, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=USER)
    with pytest.raises(openai.BadRequestError, match="positions"):
        client.chat.completions.create(model="base", messages=USER, max_tokens=ROOM)


def number(pool: Pool, name: str) -> float:
    page = httpx.get(pool.metrics_url, timeout=10).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name))


def test_one_page_has_the_numbers_of_gate_gateway_and_replica(
    pool: Pool, client: openai.OpenAI, served: list[str]
) -> None:
    assert answers(client, "base")
    eventually(lambda: number(pool, 'safeft_gate_models{state="healthy"}') == len(served))
    assert number(pool, 'safeft_probes_total{answer="error"') == 0
    assert number(pool, "safeft_generated_tokens_total") > 0
    eventually(lambda: number(pool, 'safeft_requests_total{outcome="ok",route="chat"}') > 0)


def test_a_controller_in_the_same_ray_is_on_that_page_and_leaves_the_pool_alone(
    pool: Pool,
) -> None:
    recorder = Recorder()
    recorder.set("safeft_jobs", 3, tenant="acme", phase="queued")
    push_to_pool("controller", recorder.snapshot())
    eventually(lambda: number(pool, 'safeft_jobs{phase="queued",tenant="acme"}') == 3)
    assert ActorRunner().names() == set()  # else its sweep would stop the gate


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_noticed_by_the_engine(
    pool: Pool, served: list[str], stream: bool
) -> None:
    body = {"model": "base", "messages": USER, "temperature": 0, "n": 4, "stream": stream}
    most = ROOM // 2
    cancelled = 'safeft_requests_total{outcome="cancelled"'
    before = number(pool, cancelled)
    generated = number(pool, "safeft_generated_tokens_total")
    leaving = http.client.HTTPConnection(pool.url.removeprefix("http://"), timeout=120)
    asked = json.dumps({**body, "max_tokens": most})
    as_json = {"Content-Type": "application/json"}
    leaving.request("POST", "/v1/chat/completions", asked, as_json)
    # It leaves when the engine works for it: one that leaves on its way there proves nothing.
    eventually(lambda: number(pool, "safeft_engine_running") == 4)
    assert number(pool, cancelled) == before
    if stream:
        assert leaving.getresponse().readline().startswith(b"data: ")
    leaving.close()
    eventually(lambda: number(pool, cancelled) > before)
    eventually(lambda: number(pool, "safeft_engine_running") == 0)
    assert number(pool, "safeft_generated_tokens_total") - generated < 4 * most


def test_a_killed_keeper_comes_back_with_everything_and_nobody_noticed(
    pool: Pool, admin: Admin, client: openai.OpenAI, served: list[str]
) -> None:
    admin.post("decisions", action="quarantine", model="other/bot", reason="drill", actor="pytest")
    ray.kill(actors.actor(actors.KEEPER), no_restart=False)
    assert answers(client, "acme/bot")  # at once: gateways know what they need
    eventually(lambda: row(admin, "other/bot")["state"] == "quarantined")
    with pytest.raises(openai.InternalServerError) as caught:
        answers(client, "other/bot")
    assert caught.value.code == "safety_quarantined"
    admin.post("decisions", action="release", model="other/bot", reason="drill", actor="pytest")
    eventually(lambda: answers(client, "other/bot"))


def test_a_killed_prober_goes_on(
    pool: Pool, admin: Admin, served: list[str], tmp_path: Path
) -> None:
    ray.kill(actors.actor(actors.PROBER), no_restart=False)
    save_adapter(tmp_path / "late", 5)
    admin.post("models", model="late/bot", adapter=str(tmp_path / "late"))
    eventually(lambda: row(admin, "late/bot")["state"] == "quarantined")
    admin.post("decisions", action="retire", model="late/bot", reason="over", actor="pytest")


def test_a_replica_killed_under_load_is_replaced_and_the_clients_carry_on(
    pool: Pool, served: list[str]
) -> None:
    patient = openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=8, timeout=60)
    done: list[bool] = []

    def work() -> None:
        for _ in range(4):
            done.append(answers(patient, "acme/bot"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    replicas = [
        name
        for name in ray.util.list_named_actors(all_namespaces=True)
        if "model-server" in name["name"]
    ]
    ray.kill(ray.get_actor(replicas[0]["name"], namespace=replicas[0]["namespace"]))
    for thread in threads:
        thread.join()
    assert done == [True] * 12


def test_a_second_pool_in_the_same_ray_is_refused_and_the_first_one_stays(
    pool: Pool, client: openai.OpenAI, served: list[str], tiny_dir: Path
) -> None:
    with (
        pytest.raises(PoolError, match="another serving pool"),
        running_pool(PoolConfig(policy=Policy(), base=str(tiny_dir))),
    ):
        pass
    assert answers(client, "base")

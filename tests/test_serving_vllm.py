"""The engine on vLLM against a fake of vLLM's documented classes: the glue, not vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch

from cluster.serving.engine import (
    Delta,
    Engine,
    EngineError,
    EngineLimits,
    QueueFull,
    Request,
    Sampling,
)
from cluster.serving.engines import require_engine
from cluster.serving.vllm_engine import VllmEngine
from safeft.errors import InputError, ModelError
from safeft.models import load_merged, load_tokenizer
from tests import fakevllm
from tests.fakevllm import Script
from tests.serving_world import Stack
from tests.test_serving_engine import BAD_ADAPTERS, GREEDY, Asked, broken, encode
from tests.tinyadapters import Shelf, save_adapter

USER = [{"role": "user", "content": "What is a cat?"}]


class World:
    """An engine, the script of the fake behind it, and adapters."""

    def __init__(self, tiny_dir: Path, script: Script, **limits: int) -> None:
        self.script, self.shelf = script, Shelf()
        self.engine = VllmEngine(
            tiny_dir, load_tokenizer(tiny_dir), self.shelf, EngineLimits(**limits), torch.float32
        )

    def ask(self, text: str = "Hi", **request: object) -> Asked:
        return Asked(self.engine, Request(encode(text), **request))  # type: ignore[arg-type]

    def hold(self) -> Callable[[], None]:
        """Answers stop before each token, until what is returned is called."""
        gate = self.script.go = asyncio.Event()
        return lambda: self.engine._loop.call_soon_threadsafe(gate.set)  # type: ignore[return-value]

    def settle(self) -> None:
        """Wait until the engine's thread has nothing left of what was asked of it before."""

        async def later() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        self.engine._in_loop(later()).result(timeout=60)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script(end=2)
    fakevllm.install(monkeypatch, script)
    return script


@pytest.fixture
def world(tiny_dir: Path, script: Script) -> Iterator[World]:
    made = World(tiny_dir, script, max_batch=4, max_queue=6, max_adapters=2)
    yield made
    made.engine.close()


def test_it_is_an_engine_and_vllm_is_started_with_our_limits_and_nothing_unsafe(
    world: World, tiny_dir: Path
) -> None:
    engine: Engine = world.engine  # what a type checker would see
    assert engine.room == 512
    (options,) = world.script.started
    assert (options.model, options.dtype, options.max_model_len) == (str(tiny_dir), "float32", 512)
    assert (options.load_format, options.trust_remote_code) == ("safetensors", False)
    assert (options.max_num_seqs, options.max_loras, options.max_cpu_loras) == (4, 2, 2)
    assert (options.enable_lora, options.max_lora_rank) == (True, 64)


def test_it_says_at_its_start_that_it_is_untested_on_a_gpu(
    tiny_dir: Path, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cluster.serving.vllm_engine"):
        World(tiny_dir, script).engine.close()
    assert "untested on a GPU" in caplog.text


def test_streamed_pieces_join_to_the_answer_and_the_end_token_is_not_counted(world: World) -> None:
    world.script.says[None] = "It purrs."
    streamed = world.ask(stream=True, sampling=Sampling(64))
    assert streamed.answers() == ["It purrs."]
    assert len(streamed.pieces) > 5
    assert (streamed.pieces[-1].tokens, streamed.finish) == (9, {0: "stop"})
    whole = world.ask(sampling=Sampling(4))
    assert whole.answers() == ["It p"]
    assert [(piece.tokens, piece.finish) for piece in whole.pieces] == [(4, "length")]
    world.settle()
    stats = world.engine.stats()
    assert stats.generated_tokens == 10 + 4
    assert (stats.steps, stats.running, stats.waiting) == (None, 0, 0)


def test_sampling_is_passed_on_and_several_answers_keep_their_numbers(world: World) -> None:
    world.script.says[None] = "Answer"
    way = Sampling(20, temperature=0.7, top_p=0.9, seed=11)
    for stream in (False, True):
        one = world.ask("Hello", sampling=way, n=3, stream=stream)
        assert one.answers() == ["Answer 0", "Answer 1", "Answer 2"]
        assert one.finish == {0: "stop", 1: "stop", 2: "stop"}
    prompt, passed, _, adapter = world.script.asked[0]
    assert prompt.prompt_token_ids == list(encode("Hello"))
    assert (passed.n, passed.temperature, passed.top_p, passed.seed) == (3, 0.7, 0.9, 11)
    assert (passed.max_tokens, passed.stop_token_ids, adapter) == (20, [2], None)
    salts = [asked[0].cache_salt for asked in world.script.asked]
    assert len(set(salts)) == len(salts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(world: World, stream: bool) -> None:
    world.script.says[None] = "one two three"
    way = Sampling(64, stop=(" thr", "never"))
    one = world.ask(sampling=way, stream=stream)
    assert one.answers() == ["one two"]
    assert one.finish == {0: "stop"}
    assert world.script.asked[0][1].stop == [" thr", "never"]


def test_a_cancelled_request_is_aborted_in_vllm_and_others_go_on(world: World) -> None:
    go = world.hold()
    leaving, staying = world.ask(stream=True), world.ask(stream=True)
    world.settle()
    leaving.ticket.cancel()
    world.settle()
    leaving.ticket.cancel()  # harmless
    assert world.script.aborted == [world.script.asked[0][2]]
    go()
    assert staying.answers() == ["yes"]
    staying.ticket.cancel()  # as the model server does with every request
    world.settle()
    assert leaving.deltas.empty()
    assert len(world.script.aborted) == 1
    assert world.engine.stats().running == 0


def test_a_request_that_is_cancelled_while_its_adapter_is_fetched_never_reaches_vllm(
    world: World, tmp_path: Path
) -> None:
    fetching, found = threading.Event(), threading.Event()
    weights = world.shelf.add(tmp_path / "slow", 1)
    fetch = world.shelf.fetch

    def slow(weights: str) -> Path:
        fetching.set()
        assert found.wait(60)
        return fetch(weights)

    world.shelf.fetch = slow  # type: ignore[method-assign]
    one = world.ask(weights=weights)
    assert fetching.wait(60)
    one.ticket.cancel()
    found.set()
    assert world.ask(weights=weights).answers() == ["yes"]
    assert len(world.script.asked) == 1
    assert one.deltas.empty()
    world.settle()
    assert world.engine.stats().running == 0


def test_vllm_gets_a_copy_of_what_was_checked_whatever_its_ranks_and_scales(
    world: World, tiny_dir: Path, tmp_path: Path
) -> None:
    how: dict[str, object] = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}}
    weights = world.shelf.add(tmp_path / "odd", 5, use_rslora=True, **how)
    tokens = torch.tensor([encode("What is a cat?")])
    with torch.inference_mode():
        wanted = load_merged(tiny_dir, tmp_path / "odd")(input_ids=tokens).logits
        assert world.ask(weights=weights).answers() == ["yes"]
        (loaded,) = world.script.loaded
        save_adapter(tmp_path / "odd", 6)  # what its directory holds now is not what is served
        copy = load_merged(tiny_dir, Path(loaded.lora_path))(input_ids=tokens).logits
    torch.testing.assert_close(copy, wanted, atol=1e-4, rtol=1e-4)
    assert world.ask(weights=weights).answers() == ["yes"]
    assert world.script.asked[-1][3] is loaded
    assert loaded.lora_name == weights


def test_adapters_are_mixed_kept_dropped_and_their_copies_removed(
    world: World, tmp_path: Path
) -> None:
    hashes = [world.shelf.add(tmp_path / str(seed), seed) for seed in range(3)]
    for weights in hashes:
        world.script.says[weights] = f"I am {weights[:4]}"
    for weights in [*hashes, hashes[2], hashes[0]]:
        assert world.ask(weights=weights).answers() == [f"I am {weights[:4]}"]
    world.settle()
    stats = world.engine.stats()
    adapters = stats.adapters
    assert (adapters.loaded, adapters.misses, adapters.hits) == (2, 4, 1)
    there = [Path(request.lora_path).exists() for request in world.script.loaded]
    assert there == [False, False, True, True]
    assert len({request.lora_int_id for request in world.script.loaded}) == 4


@pytest.mark.parametrize(("kind", "how", "message"), BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_before_vllm_sees_a_file(
    world: World, tmp_path: Path, kind: str, how: dict[str, object], message: str
) -> None:
    weights = save_adapter(tmp_path / "bad", 9, **how)  # type: ignore[arg-type]
    weights = broken(tmp_path / "bad", kind) or weights
    world.shelf.at[weights] = tmp_path / "bad"
    with pytest.raises(ModelError, match=message):
        world.ask(weights=weights).answers()
    assert not world.script.loaded
    assert world.ask().answers() == ["yes"]


def test_weights_that_are_not_the_registered_ones_are_refused(world: World, tmp_path: Path) -> None:
    weights = world.shelf.add(tmp_path / "mine", 10)
    save_adapter(tmp_path / "mine", 11)
    with pytest.raises(ModelError, match="register the model again"):
        world.ask(weights=weights).answers()
    assert not world.script.loaded


def test_an_adapter_that_vllm_does_not_load_fails_its_own_requests_and_is_tried_again(
    world: World, tmp_path: Path
) -> None:
    weights = world.shelf.add(tmp_path / "odd", 1)
    world.script.refuses[weights] = "expected target modules in {'qkv_proj'}"
    with pytest.raises(ModelError, match=r"vLLM does not load it: .*expected target modules"):
        world.ask(weights=weights).answers()
    assert world.ask().answers() == ["yes"]
    assert world.engine.stats().adapters.failures == 1
    world.script.refuses.clear()
    assert world.ask(weights=weights).answers() == ["yes"]
    world.engine.check()


def test_the_queue_is_bounded_and_has_room_again(world: World) -> None:
    go = world.hold()
    taken = [world.ask(n=2, sampling=GREEDY) for _ in range(5)]
    with pytest.raises(QueueFull) as full:
        world.ask()
    assert (full.value.waiting, 1 <= full.value.retry_after_s <= 60) == (6, True)
    assert (world.engine.stats().running, world.engine.stats().waiting) == (4, 6)
    go()
    for one in taken:
        assert one.answers() == ["yes 0", "yes 1"]
    world.settle()
    assert world.ask().answers() == ["yes"]


@pytest.mark.parametrize(
    ("error", "expected", "healthy"),
    [
        (fakevllm.VLLMClientError("too long"), InputError, True),
        (fakevllm.EngineGenerateError(), EngineError, True),
        (fakevllm.EngineDeadError("EngineCore encountered an issue."), EngineError, False),
        (TypeError("nobody documented this"), EngineError, False),
    ],
)
def test_an_error_of_vllm_ends_its_request_and_only_its_death_the_engine(
    world: World, error: Exception, expected: type[Exception], healthy: bool
) -> None:
    world.script.fails = error
    with pytest.raises(expected):
        world.ask().answers()
    world.script.fails = None
    if healthy:
        world.engine.check()
        assert world.ask().answers() == ["yes"]
        return
    with pytest.raises(EngineError, match="failed"):
        world.engine.check()
    with pytest.raises(EngineError, match="failed"):
        world.ask()


def test_the_death_of_vllms_process_ends_every_answer_and_is_seen_by_the_health_check(
    world: World,
) -> None:
    go = world.hold()
    running = [world.ask(stream=bool(i % 2)) for i in range(3)]
    world.settle()
    world.engine.check()
    world.script.errored = True
    go()
    for one in running:
        with pytest.raises(EngineError, match="has failed"):
            one.answers()
    with pytest.raises(EngineError, match="has failed"):
        world.engine.check()


def test_a_process_that_died_while_nobody_asked_is_noticed(world: World) -> None:
    world.script.errored = True
    with pytest.raises(EngineError, match="vLLM's process has died"):
        world.engine.check()


def test_an_answer_that_vllm_ended_in_another_way_is_an_error_and_no_answer(world: World) -> None:
    world.script.ends_with = "repetition"
    with pytest.raises(EngineError, match="'repetition'"):
        world.ask().answers()


def test_closing_ends_every_request_and_vllm(tiny_dir: Path, script: Script) -> None:
    world = World(tiny_dir, script)
    world.hold()
    asked = [world.ask() for _ in range(3)]
    world.engine.close()
    for one in asked:
        with pytest.raises(EngineError, match="stopped"):
            one.answers()
    with pytest.raises(EngineError, match="stopped"):
        world.engine.submit(Request(encode("Hi")), lambda delta: None)
    with pytest.raises(EngineError, match="stopped"):
        world.engine.check()
    assert script.shut
    asked[0].ticket.cancel()  # harmless
    world.engine.close()


def test_a_vllm_that_does_not_start_says_why(tiny_dir: Path, script: Script) -> None:
    script.fails = OSError("no GPU is there")
    with pytest.raises(EngineError, match="vLLM does not start: no GPU is there"):
        World(tiny_dir, script)


def test_without_vllm_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"safeft\[vllm\]"):
        require_engine("vllm")
    require_engine("transformers")


def test_the_official_client_is_answered_through_it(
    tiny_dir: Path, tmp_path: Path, script: Script
) -> None:
    script.says[None] = "It purrs, and sleeps."
    world = World(tiny_dir, script)
    stack = Stack(tmp_path, lambda: (world.engine, load_tokenizer(tiny_dir)))
    try:
        stack.clear("base")
        client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
        asked = {"model": "base", "messages": USER, "stop": [" sleeps"], "max_tokens": 40}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == "It purrs, and"
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == "It purrs, and"
    finally:
        stack.close()


def test_deltas_of_a_request_that_failed_end_with_the_error(world: World) -> None:
    deltas: list[Delta] = []
    done = threading.Event()
    world.script.fails = fakevllm.EngineGenerateError("x")

    def deliver(delta: Delta) -> None:
        deltas.append(delta)
        done.set()

    world.engine.submit(Request(encode("Hi"), n=2), deliver)
    assert done.wait(60)
    world.settle()
    assert [delta.error is None for delta in deltas] == [False]

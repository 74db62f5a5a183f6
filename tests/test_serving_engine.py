"""The transformers engine: mixed batches equal single requests, and no request hurts another."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cluster.serving.engine import (
    Delta,
    Engine,
    EngineError,
    EngineLimits,
    QueueFull,
    Request,
    Sampling,
)
from cluster.serving.lora import LoraSlots
from cluster.serving.sampling import BROKEN, choose, new_generator
from cluster.serving.text import TextStream
from cluster.serving.transformers_engine import TransformersEngine
from safeft.errors import InputError, ModelError
from safeft.evaluate import generate_greedy
from safeft.models import adapter_hash, load_merged, load_model, load_tokenizer, read_lora
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tinyadapters import Shelf, save_adapter

GREEDY = Sampling(max_tokens=24, temperature=0)
PROMPTS = ["Hi", "What is a cat?", "Tell me of the sea and of all that lives in it.", "a" * 90]


def encode(text: str) -> tuple[int, ...]:
    rendered = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return tuple(tiny_tokenizer()(rendered, add_special_tokens=False)["input_ids"])


class Asked:
    """A submitted request, and everything that was delivered."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self.open = request.n
        self.ticket = engine.submit(request, self.deltas.put)

    def answers(self) -> list[str]:
        """The texts, joined; raises the error if there was one."""
        texts: dict[int, str] = {}
        self.pieces = []
        self.finish: dict[int, str | None] = {}
        while self.open:
            delta = self.deltas.get(timeout=60)
            if delta.error is not None:
                raise delta.error
            self.pieces.append(delta)
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            if delta.finish is not None:
                self.finish[delta.index] = delta.finish
                self.open -= 1
        return [texts[index] for index in sorted(texts)]


def idle(engine: TransformersEngine) -> TransformersEngine:
    """The engine, when the rows of delivered answers are free again."""
    while engine.stats().running or engine.stats().waiting:
        time.sleep(0.001)
    return engine


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights: its answers depend on every token before them."""
    directory = tmp_path_factory.mktemp("lively")
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter *= 3 if "embed" in name else 20
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    shelf = Shelf()
    root = tmp_path_factory.mktemp("adapters")
    shelf.add(root / "all", 1)
    shelf.add(root / "attention", 2, targets=["q_proj", "v_proj"], rank=2)
    shelf.add(root / "wide", 3, rank=12, scale=0.2)
    shelf.add(root / "rslora", 4, use_rslora=True)
    shelf.add(root / "ranks", 5, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 3})
    shelf.add(root / "one_layer", 6, layers_to_transform=[1])
    return shelf


@pytest.fixture(scope="module")
def engine(tiny_dir: Path, shelf: Shelf) -> Iterator[TransformersEngine]:
    made = TransformersEngine(
        load_model(tiny_dir), load_tokenizer(tiny_dir), shelf, EngineLimits(max_batch=5)
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(tiny_dir: Path, shelf: Shelf) -> dict[tuple[str | None, str], str]:
    """What peft and our own evaluation make of every prompt, one by one: the oracle."""
    found: dict[tuple[str | None, str], str] = {}
    tokenizer = load_tokenizer(tiny_dir)
    for weights in [None, *shelf.at]:
        model = load_merged(tiny_dir, shelf.at[weights] if weights else None)
        for prompt in PROMPTS:
            found[weights, prompt] = generate_greedy(
                model, tokenizer, [prompt], max_new_tokens=GREEDY.max_tokens
            )[0]
    return found


def test_the_adapters_of_these_tests_really_answer_differently(
    alone: dict[tuple[str | None, str], str], shelf: Shelf
) -> None:
    for prompt in PROMPTS:
        texts = {alone[weights, prompt] for weights in [None, *shelf.at]}
        assert len(texts) == 1 + len(shelf.at)
        assert all(len(set(text)) > 3 for text in texts), texts  # none repeats one token


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mixed_batch_gives_each_request_the_tokens_it_gets_alone(
    engine: TransformersEngine,
    alone: dict[tuple[str | None, str], str],
    seed: int,
) -> None:
    order = list(alone)  # more than fit into the batch: they join while others run
    random.Random(seed).shuffle(order)
    asked = [
        Asked(engine, Request(encode(prompt), GREEDY, weights, stream=bool(i % 2)))
        for i, (weights, prompt) in enumerate(order)
    ]
    for key, one in zip(order, asked, strict=True):
        assert one.answers() == [alone[key]], key


def test_one_request_alone_gives_the_same(
    engine: TransformersEngine, alone: dict[tuple[str | None, str], str]
) -> None:
    for (weights, prompt), expected in list(alone.items())[:6]:
        assert Asked(engine, Request(encode(prompt), GREEDY, weights)).answers() == [expected]


def test_answers_of_different_lengths_leave_the_batch_when_they_are_finished(
    engine: TransformersEngine, alone: dict[tuple[str | None, str], str], shelf: Shelf
) -> None:
    weights = next(iter(shelf.at))
    lengths = [3, 17, 1, 24, 9, 12, 2]
    asked = [
        Asked(engine, Request(encode(PROMPTS[1]), Sampling(n, temperature=0), weights, stream=True))
        for n in lengths
    ]
    for length, one in zip(lengths, asked, strict=True):
        (text,) = one.answers()
        assert alone[weights, PROMPTS[1]].startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert one.pieces[-1].tokens <= length
        assert one.finish[0] in ("length", "stop")


def test_a_seed_repeats_an_answer_in_whatever_company_and_n_gives_different_ones(
    engine: TransformersEngine,
) -> None:
    warm = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=7)
    request = Request(encode("Hi"), warm, n=3)
    first = Asked(engine, request).answers()
    company = [Asked(engine, Request(encode(p), Sampling(16))) for p in PROMPTS[:2]]
    assert Asked(engine, request).answers() == first
    assert len(set(first)) == 3
    for one in company:
        one.answers()


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(
    engine: TransformersEngine, alone: dict[tuple[str | None, str], str]
) -> None:
    whole = alone[None, PROMPTS[2]]
    stop = whole[4:6]
    for stream in (False, True):
        sampling = Sampling(24, temperature=0, stop=(stop, "never"))
        one = Asked(engine, Request(encode(PROMPTS[2]), sampling, stream=stream))
        assert one.answers() == [whole[: whole.index(stop)]]
        assert one.finish == {0: "stop"}


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(
    tiny_dir: Path, shelf: Shelf
) -> None:
    limits = EngineLimits(max_batch=2, max_queue=20)
    engine = TransformersEngine(load_model(tiny_dir), load_tokenizer(tiny_dir), shelf, limits)
    try:
        long = Request(encode("Hi"), Sampling(60, temperature=0))
        taken, refused = [], []
        for _ in range(200):
            try:
                taken.append(Asked(engine, long))
            except QueueFull as full:
                refused.append(full)
        assert refused
        assert 1 <= refused[-1].retry_after_s <= 60
        assert engine.stats().waiting <= 20
        assert len({one.answers()[0] for one in taken}) == 1  # everybody who was let in is served
        assert idle(engine).stats().generated_tokens
    finally:
        engine.close()


def test_a_cancelled_request_leaves_and_the_others_go_on(
    engine: TransformersEngine, alone: dict[tuple[str | None, str], str], shelf: Shelf
) -> None:
    weights = next(iter(shelf.at))
    leaving = Asked(engine, Request(encode("Hi"), Sampling(400, temperature=0), weights, n=2))
    staying = Asked(engine, Request(encode(PROMPTS[1]), GREEDY, weights))
    leaving.ticket.cancel()
    assert staying.answers() == [alone[weights, PROMPTS[1]]]
    # Its rows are free again: far fewer steps than its 400 tokens.
    steps = engine.stats().steps
    Asked(engine, Request(encode(PROMPTS[1]), GREEDY, n=5)).answers()
    assert idle(engine).stats().steps - steps < 100


def broken(directory: Path, kind: str) -> str | None:
    """Break an adapter; its new hash, where it has one: what was registered is what is there."""
    file = directory / "adapter_model.safetensors"
    if kind == "corrupt header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif kind == "NaN":
        tensors = load_file(file)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, file)
    elif kind == "pickle":
        file.rename(directory / "adapter_model.bin")
    elif kind == "a tensor is missing":
        tensors = load_file(file)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, file)
    return adapter_hash(directory) if kind in ("NaN", "a tensor is missing") else None


BAD_ADAPTERS: list[tuple[str, dict[str, object], str]] = [
    ("corrupt header", {}, "not a safetensors file"),
    ("NaN", {}, "not finite"),
    ("pickle", {}, "adapter_model"),
    ("a tensor is missing", {}, "lacks .*lora_A"),
    ("another base model's", {"hidden": 64}, "another model's adapter"),
    ("ten times the rank", {"rank": 80}, "rank 80, more than the 64"),
    ("more than LoRA", {"use_dora": True}, "use_dora is not supported"),
]


@pytest.mark.parametrize(("kind", "how", "message"), BAD_ADAPTERS)
def test_a_bad_adapter_fails_its_own_requests_with_the_reason(
    engine: TransformersEngine,
    alone: dict[tuple[str | None, str], str],
    shelf: Shelf,
    tmp_path: Path,
    kind: str,
    how: dict[str, object],
    message: str,
) -> None:
    weights = save_adapter(tmp_path / "bad", 9, **how)  # type: ignore[arg-type]
    weights = broken(tmp_path / "bad", kind) or weights
    shelf.at[weights] = tmp_path / "bad"
    try:
        good = Asked(engine, Request(encode(PROMPTS[1]), GREEDY))
        with pytest.raises(ModelError, match=message) as caught:
            Asked(engine, Request(encode("Hi"), GREEDY, weights)).answers()
        assert str(tmp_path) not in str(caught.value)  # a tenant reads it
        assert good.answers() == [alone[None, PROMPTS[1]]]
    finally:
        del shelf.at[weights]


def test_weights_that_changed_on_disk_are_not_served_under_the_old_name(
    engine: TransformersEngine, shelf: Shelf, tmp_path: Path
) -> None:
    weights = shelf.add(tmp_path / "mine", 10)
    save_adapter(tmp_path / "mine", 11)
    with pytest.raises(ModelError, match="register the model again"):
        Asked(engine, Request(encode("Hi"), GREEDY, weights)).answers()
    del shelf.at[weights]


def test_an_unreachable_store_fails_only_who_needs_it_and_is_tried_again(
    engine: TransformersEngine,
    alone: dict[tuple[str | None, str], str],
    shelf: Shelf,
    tmp_path: Path,
) -> None:
    weights = shelf.add(tmp_path / "far", 12)
    loaded = next(iter(shelf.at))
    Asked(engine, Request(encode("Hi"), GREEDY, loaded)).answers()
    shelf.reachable = False
    with pytest.raises(ModelError, match="cannot be reached"):
        Asked(engine, Request(encode("Hi"), GREEDY, weights)).answers()
    assert Asked(engine, Request(encode("Hi"), GREEDY, loaded)).answers() == [alone[loaded, "Hi"]]
    shelf.reachable = True
    assert Asked(engine, Request(encode("Hi"), GREEDY, weights)).answers()
    del shelf.at[weights]


class Hanging(Shelf):
    """Like a store whose packets are dropped: only `at` is there, all else takes for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()

    def fetch(self, weights: str) -> Path:
        if weights not in self.at:
            self.back.wait(120)
            raise ModelError("the artifact store does not answer")
        return super().fetch(weights)


def test_a_store_that_hangs_holds_up_nobody_whose_adapter_is_there(
    tiny_dir: Path, tmp_path: Path
) -> None:
    shelf = Hanging()
    weights = shelf.add(tmp_path / "here", 13)
    engine = TransformersEngine(load_model(tiny_dir), load_tokenizer(tiny_dir), shelf)
    try:
        waiting = [
            Asked(engine, Request(encode("Hi"), GREEDY, f"{number:064x}")) for number in range(8)
        ]
        assert Asked(engine, Request(encode("Hi"), GREEDY, weights)).answers()
        shelf.back.set()
        for one in waiting:
            with pytest.raises(ModelError, match="does not answer"):
                one.answers()
    finally:
        shelf.back.set()
        engine.close()


def test_adapters_used_longest_ago_are_dropped_and_loaded_again(
    tiny_dir: Path, shelf: Shelf, alone: dict[tuple[str | None, str], str]
) -> None:
    limits = EngineLimits(max_batch=2, max_adapters=2)
    engine = TransformersEngine(load_model(tiny_dir), load_tokenizer(tiny_dir), shelf, limits)
    shelf.asked.clear()
    try:
        one, two, three, *_ = shelf.at
        for weights in (one, two, one, three, one, two):
            answer = Asked(engine, Request(encode("Hi"), GREEDY, weights)).answers()
            assert answer == [alone[weights, "Hi"]]
        assert shelf.asked == [one, two, three, two]
        stats = idle(engine).stats()
        adapters = stats.adapters
        assert (adapters.loaded, adapters.hits, adapters.misses, adapters.evictions) == (2, 2, 4, 2)
    finally:
        engine.close()


def test_closing_the_engine_ends_every_request_with_an_error(tiny_dir: Path, shelf: Shelf) -> None:
    engine = TransformersEngine(load_model(tiny_dir), load_tokenizer(tiny_dir), shelf)
    asked = [Asked(engine, Request(encode("Hi"), Sampling(400, temperature=0))) for _ in range(20)]
    engine.close()
    for one in asked:
        with pytest.raises(EngineError, match="stopped"):
            one.answers()
    with pytest.raises(EngineError, match="stopped"):
        engine.submit(Request(encode("Hi")), lambda delta: None)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "prompt is empty"),
        (Request((1,) * 500, Sampling(20)), "512 positions"),
        (Request((1,), Sampling(0)), "max_tokens"),
        (Request((1,), Sampling(4, temperature=-1)), "temperature"),
        (Request((1,), Sampling(4, top_p=0)), "top_p"),
        (Request((1,), Sampling(4, stop=("",))), "empty text"),
        (Request((1,), n=6), "n: must be between 1 and 5"),
    ],
)
def test_a_request_that_can_never_be_answered_is_refused(
    engine: TransformersEngine, request_: Request, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.submit(request_, lambda delta: None)


def test_logits_that_are_not_finite_end_the_answer_instead_of_making_one_up() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, float("nan"), 1.0], [-torch.inf] * 3])
    assert choose(logits, [(GREEDY, None)] * 3) == [1, BROKEN, BROKEN]


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_of_almost_nothing_is_greedy_and_breaks_no_step(
    temperature: float, top_p: float
) -> None:
    way = Sampling(temperature=temperature, top_p=top_p, seed=1)
    logits = torch.tensor([[-30.0, 25.0, 24.0, -torch.inf]])
    assert choose(logits, [(way, new_generator(way, 0))]) == [1]


def test_a_wider_adapter_than_any_before_enters_together_with_others(
    tiny_dir: Path, shelf: Shelf
) -> None:
    narrow, _, wide, *_ = shelf.at
    model = load_model(tiny_dir)
    slots = LoraSlots(model, 4)
    original = load_model(tiny_dir)
    slots.use([narrow, wide, None], lambda key: read_lora(original, shelf.at[key]))
    tokens = torch.tensor([encode("Hi")] * 3)
    with torch.inference_mode():
        mixed = model(input_ids=tokens).logits
        for row, key in enumerate([narrow, wide, None]):
            oracle = load_merged(tiny_dir, shelf.at[key] if key else None)
            torch.testing.assert_close(
                mixed[row], oracle(input_ids=tokens[:1]).logits[0], atol=1e-3, rtol=1e-3
            )


def test_an_adapter_that_overflows_breaks_nobody_else_now_or_later(
    tiny_dir: Path,
    alone: dict[tuple[str | None, str], str],
    shelf: Shelf,
    tmp_path: Path,
) -> None:
    save_adapter(tmp_path / "huge", 13)
    file = tmp_path / "huge" / "adapter_model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.fill_(3e38 if tensor.shape[0] == 4 else 1.0)  # A and B; finite, but their sums?
    save_file(tensors, file)
    huge, good = adapter_hash(tmp_path / "huge"), next(iter(shelf.at))
    shelf.at[huge] = tmp_path / "huge"
    limits = EngineLimits(max_batch=3)
    engine = TransformersEngine(load_model(tiny_dir), load_tokenizer(tiny_dir), shelf, limits)
    try:
        beside = Asked(engine, Request(encode(PROMPTS[1]), GREEDY, good))
        bad = [Asked(engine, Request(encode("a" * 90), GREEDY, huge)) for _ in range(3)]
        assert beside.answers() == [alone[good, PROMPTS[1]]]
        for one in bad:
            with pytest.raises(EngineError, match="not finite"):
                one.answers()
        # The rows that it left hold nothing of it.
        later = [Asked(engine, Request(encode("Hi"), GREEDY, good)) for _ in range(3)]
        assert [one.answers() for one in later] == [[alone[good, "Hi"]]] * 3
    finally:
        engine.close()
        del shelf.at[huge]


def test_a_scale_that_makes_an_adapter_infinite_is_refused_before_it_is_used(
    engine: TransformersEngine, shelf: Shelf, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "scaled", 14)
    file = tmp_path / "scaled" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 1e300}))
    weights = adapter_hash(tmp_path / "scaled")
    shelf.at[weights] = tmp_path / "scaled"
    try:
        with pytest.raises(ModelError, match="once scaled by alpha"):
            Asked(engine, Request(encode("Hi"), GREEDY, weights)).answers()
    finally:
        del shelf.at[weights]


def test_top_p_never_chooses_outside_the_likeliest_tokens() -> None:
    logits = torch.tensor([[5.0, 4.5, 0.0, 0.0, 0.0]])
    way = Sampling(temperature=1.0, top_p=0.8, seed=3)
    generator = new_generator(way, 0)
    drawn = {choose(logits, [(way, generator)])[0] for _ in range(200)}
    assert drawn == {0, 1}


@settings(max_examples=80)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=40),
    stops=st.lists(st.text("abé😀 ", min_size=1, max_size=3), max_size=3),
)
def test_streamed_pieces_join_to_the_text_before_the_first_stop(
    text: str, stops: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokens:
        if not stream.stopped:
            pieces.append(stream.push(token))
    if not stream.stopped:
        pieces.append(stream.finish())
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    got = "".join(pieces)
    if not ends:
        assert got == whole
    else:  # a stop is seen when its last character comes: one that ends first may begin later
        assert whole.startswith(got)
        assert not any(stop in got for stop in stops)
        assert len(got) in ends

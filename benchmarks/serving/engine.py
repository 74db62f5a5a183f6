"""The engine by itself: eight adapters mixed in a batch against one, and against `generate`."""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.serving.engine import Delta, EngineLimits, Request, Sampling
from cluster.serving.transformers_engine import TransformersEngine
from safeft.data import encode_prompt
from safeft.models import adapter_hash, load_model, load_tokenizer
from safeft.prompts import load_prompts

ADAPTERS = 8


@dataclass(frozen=True)
class Load:
    """How much is asked: `requests` prompts at once, `tokens` new ones each at most."""

    requests: int = 64
    tokens: int = 48
    batch: int = 16
    repeats: int = 5

    @staticmethod
    def of(quick: bool) -> Load:
        """The whole load, or a smaller one."""
        return Load(requests=16, tokens=16, batch=8, repeats=2) if quick else Load()

    def prompts(self) -> list[str]:
        """The first benign prompts of the package."""
        return [p.text for p in load_prompts("benign", "profile")[: self.requests]]


def write_adapters(
    model_dir: Path, root: Path, count: int, rank: int = 8, spread: float = 1e-3
) -> dict[str, Path]:
    """Random LoRA adapters on every linear layer of the decoder: hash -> directory.

    Args:
        spread: of B. It is small, so that the answers stay words of about the usual length; with
            1 they are noise.
    """
    model = load_model(model_dir)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    found = {}
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, module in linear.items():
            a = torch.randn(rank, module.in_features, generator=draw) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=draw) * spread
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        directory = root / f"adapter-{seed}"
        directory.mkdir(parents=True)
        save_file(tensors, directory / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted({name.rpartition(".")[2] for name in linear}),
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        found[adapter_hash(directory)] = directory
    return found


class Directories:
    """An AdapterSource of known directories."""

    def __init__(self, at: dict[str, Path]) -> None:
        self.at = at

    def fetch(self, weights: str) -> Path:
        """See AdapterSource."""
        return self.at[weights]


def rate(
    engine: TransformersEngine,
    prompts: Sequence[tuple[int, ...]],
    adapters: Sequence[str | None],
    tokens: int,
) -> float:
    """Tokens a second of all prompts sent at once, adapters given out in turn."""
    finished = threading.Semaphore(0)
    ends: list[Delta] = []

    def deliver(delta: Delta) -> None:
        ends.append(delta)
        finished.release()

    began = time.monotonic()
    for index, prompt in enumerate(prompts):
        weights = adapters[index % len(adapters)]
        engine.submit(Request(prompt, Sampling(tokens, temperature=0), weights), deliver)
    for _ in prompts:
        finished.acquire()
    took = time.monotonic() - began
    for delta in ends:
        if delta.error is not None:
            raise delta.error
    return sum(delta.tokens for delta in ends) / took


def mixed_over_single(model_dir: Path, root: Path, load: Load) -> dict[str, float]:
    """The same load on eight adapters in turn and on one, interleaved; the median of the ratios."""
    at = write_adapters(model_dir, root, ADAPTERS)
    tokenizer = load_tokenizer(model_dir)
    prompts = [tuple(encode_prompt(text, tokenizer)) for text in load.prompts()]
    limits = EngineLimits(max_batch=load.batch, max_queue=load.requests)
    engine = TransformersEngine(load_model(model_dir), tokenizer, Directories(at), limits)
    try:
        names = list(at)
        rate(engine, prompts, names, 2)  # loads them all
        pairs = []
        for _ in range(load.repeats):
            mixed = rate(engine, prompts, names, load.tokens)
            single = rate(engine, prompts, names[:1], load.tokens)
            pairs.append((mixed, single, rate(engine, prompts, [None], load.tokens)))
    finally:
        engine.close()
    return {
        "mixed_over_single": statistics.median(mixed / single for mixed, single, _ in pairs),
        "mixed_tokens_per_second": statistics.median(mixed for mixed, _, _ in pairs),
        "single_tokens_per_second": statistics.median(single for _, single, _ in pairs),
        "single_over_base": statistics.median(single / base for _, single, base in pairs),
    }


class StaticBatches:
    """transformers' `generate` on the same prompts, in the batch size that is fastest here.

    Prompts of similar length share a batch; tokens after the end of an answer do not count.
    """

    def __init__(self, model_dir: Path, load: Load) -> None:
        self._model, self._tokenizer = load_model(model_dir), load_tokenizer(model_dir)
        self._tokenizer.padding_side = "left"
        self._tokens = load.tokens
        prompts = (encode_prompt(text, self._tokenizer) for text in load.prompts())
        self._prompts = sorted(prompts, key=len)
        sizes = sorted({load.batch // 2, load.batch, 2 * load.batch})
        self.rate(sizes[0])  # the first call is slower
        self._best = max(sizes, key=self.rate)

    def rate(self, size: int | None = None) -> float:
        """Tokens a second; `size`: of a batch, the best one by default."""
        size = size or self._best
        counted, began = 0, time.monotonic()
        for start in range(0, len(self._prompts), size):
            rows = {"input_ids": self._prompts[start : start + size]}
            batch = self._tokenizer.pad(rows, return_tensors="pt")
            with torch.inference_mode():
                out = self._model.generate(
                    **batch,
                    max_new_tokens=self._tokens,
                    do_sample=False,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            new = out[:, batch["input_ids"].shape[1] :]
            end = self._tokenizer.eos_token_id
            for row in new.tolist():
                counted += row.index(end) if end in row else len(row)
        return counted / (time.monotonic() - began)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

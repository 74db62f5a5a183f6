"""What safeft uses of vLLM 0.33's documented API, without vLLM: names, arguments and behaviour.

The model behind it says what the test tells it to, one character a token.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class TokensPrompt:
    prompt_token_ids: list[int]
    cache_salt: str


@dataclass
class AsyncEngineArgs:
    model: str
    tokenizer: str
    trust_remote_code: bool
    load_format: str
    dtype: str
    seed: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_lora: bool
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    disable_log_stats: bool


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool


class VLLMError(Exception):
    pass


class VLLMClientError(VLLMError):
    pass


class EngineGenerateError(VLLMError):
    pass


class EngineDeadError(VLLMError):
    pass


@dataclass
class Script:
    """What the model says and does, and what it saw.

    Attributes:
        says: the whole answer of an adapter's hash, None for the base; the end token follows.
        go: answers wait for it before each token; None: they do not wait.
        refuses: adapters that cannot be loaded, and why.
        fails: an error that every request ends with.
        ends_with: how answers finish, if not as they should.
    """

    end: int
    says: dict[str | None, str] = field(default_factory=dict)
    go: asyncio.Event | None = None
    refuses: dict[str, str] = field(default_factory=dict)
    fails: Exception | None = None
    ends_with: str | None = None
    started: list[AsyncEngineArgs] = field(default_factory=list)
    asked: list[tuple[TokensPrompt, SamplingParams, str, LoRARequest | None]] = field(
        default_factory=list
    )
    loaded: list[LoRARequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    errored: bool = False
    shut: bool = False


class AsyncLLMEngine:
    script: Script

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> AsyncLLMEngine:
        asyncio.get_running_loop()
        if isinstance(cls.script.fails, OSError):
            raise cls.script.fails
        cls.script.started.append(engine_args)
        return cls()

    @property
    def errored(self) -> bool:
        return self.script.errored

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        await asyncio.sleep(0)
        if why := self.script.refuses.get(lora_request.lora_name):
            raise Exception(f"Call to add_lora method failed: {why}")  # as its process sends it
        assert Path(lora_request.lora_path, "adapter_model.safetensors").exists()
        self.script.loaded.append(lora_request)
        return True

    async def abort(self, request_id: str | Iterable[str]) -> None:
        self.script.aborted.append(str(request_id))

    async def generate(
        self,
        prompt: TokensPrompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        script, way = self.script, sampling_params
        script.asked.append((prompt, way, request_id, lora_request))
        name = lora_request.lora_name if lora_request else None
        texts, tokens = [""] * way.n, [list[int]() for _ in range(way.n)]
        reasons: list[str | None] = [None] * way.n
        # A text that may be the beginning of a stop is not handed out before it is clear.
        held = max((len(stop) - 1 for stop in way.stop or ()), default=0)
        told = [0] * way.n
        while None in reasons:
            if script.go is not None:
                await script.go.wait()
            await asyncio.sleep(0)
            if script.errored:
                raise EngineDeadError("EngineCore encountered an issue.")
            if script.fails is not None:
                raise script.fails
            pieces = []
            for index in range(way.n):
                if reasons[index] is not None:
                    continue
                whole = script.says.get(name, "yes") + (f" {index}" if way.n > 1 else "")
                at = len(tokens[index])
                over = at == len(whole)
                texts[index] += "" if over else whole[at]
                tokens[index].append(script.end if over else ord(whole[at]))
                stops = [s for s in way.stop or () if s in texts[index]]
                if over or stops:
                    reasons[index] = "stop"
                elif len(tokens[index]) == way.max_tokens:
                    reasons[index] = "length"
                if stops:
                    texts[index] = texts[index][: texts[index].index(stops[0])]
                reason = reasons[index] = reasons[index] and (script.ends_with or reasons[index])
                ready = len(texts[index]) - (0 if reason else held)
                if way.output_kind is RequestOutputKind.DELTA:
                    text = texts[index][told[index] : max(ready, told[index])]
                    told[index] = max(ready, told[index])
                    pieces.append(CompletionOutput(index, text, tokens[index][-1:], reason))
            finished = None not in reasons
            if way.output_kind is RequestOutputKind.FINAL_ONLY and finished:
                pieces = [
                    CompletionOutput(i, texts[i], tokens[i], reasons[i]) for i in range(way.n)
                ]
            if pieces:
                yield RequestOutput(request_id, pieces, finished)

    def shutdown(self) -> None:
        self.script.shut = True


def install(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    """Let ``import vllm`` find the fake."""
    names: dict[str, dict[str, Any]] = {
        "vllm": {
            "__version__": "0.33.0",
            "AsyncEngineArgs": AsyncEngineArgs,
            "AsyncLLMEngine": type("AsyncLLMEngine", (AsyncLLMEngine,), {"script": script}),
            "SamplingParams": SamplingParams,
            "TokensPrompt": TokensPrompt,
        },
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
        "vllm.exceptions": {"VLLMError": VLLMError, "VLLMClientError": VLLMClientError},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

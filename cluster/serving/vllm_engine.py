"""An engine on vLLM, for GPUs: batch, attention and sampling are vLLM's, everything else is ours.

**Untested on a GPU.** It is written against the documented API of vLLM 0.33 (`AsyncLLMEngine`,
`AsyncEngineArgs`, `SamplingParams`, `LoRARequest`, `TokensPrompt`) and tested against a small fake
of these classes; docs/serving.md says what was tried beside that. `safeft[vllm]` installs vLLM.

An adapter is checked as for every engine, and vLLM is handed a copy written from the tensors that
were checked: what lies in the tenant's directory, now or later, never reaches it. One thread owns
vLLM's client; its engine is a process of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.serving.adapters import AdapterCache, AdapterSource, load_checked
from cluster.serving.engine import (
    Delta,
    EngineError,
    EngineLimits,
    EngineStats,
    Request,
    check_request,
)
from cluster.serving.vllm_job import VllmJob, explained, hand_out, sampling_params
from safeft.adapters import LoraFactors, save_factors, stacked
from safeft.errors import InputError, ModelError, SafeftError
from safeft.evaluate.generate import end_and_pad_ids
from safeft.models import load_architecture
from safeft.models.explain import one_line

log = logging.getLogger(__name__)
_LOAD_S = 300.0
#: Ranks that vLLM makes room for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_Done = TypeVar("_Done")


class VllmEngine:
    """An Engine over vLLM.

    Args:
        base: directory of the base model.
        adapters: where adapters come from.
        dtype: of weights and activations.

    Raises:
        ModelError: the base model is not one that transformers knows.
        EngineError: vLLM does not start.
    """

    def __init__(
        self,
        base: str | Path,
        tokenizer: Any,
        adapters: AdapterSource,
        limits: EngineLimits,
        dtype: torch.dtype,
    ) -> None:
        self.limits = limits
        self._source = adapters
        self._layers = load_architecture(base, dtype=dtype)
        self.room = int(self._layers.config.max_position_embeddings)
        self._ends = frozenset(end_and_pad_ids(self._layers, tokenizer)[0])
        self._files = tempfile.TemporaryDirectory(prefix="safeft-vllm-")
        self._numbers = itertools.count(1)
        self._adapters: AdapterCache[Any] = AdapterCache(
            self._load, limits.max_adapters, lambda _, loaded: shutil.rmtree(loaded.lora_path)
        )
        self._lock = threading.Lock()
        self._open = 0  # answers that were taken and are not finished
        self._stopping = False
        self._failure = ""
        self._prompt_tokens = self._generated = 0
        self._answer_s = 1.0  # how long a request takes, a moving average
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            self._vllm = self._in_loop(self._start(Path(base), dtype)).result()
        except Exception as error:  # whatever a foreign engine says when it does not start
            self._end_loop()
            raise EngineError(f"vLLM does not start: {one_line(str(error))}") from error

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> VllmJob:
        """See Engine."""
        check_request(request, self.room, self.limits.max_batch)
        job = VllmJob(request, deliver, self._cancel, [0] * request.n, request.n)
        with self._lock:
            self._require_running()
            waiting = max(0, self._open - self.limits.max_batch)
            if self._open + request.n > self.limits.max_batch + self.limits.max_queue:
                raise self.limits.full(waiting, self._answer_s)
            self._open += request.n
        if request.weights is None:
            self._enter(job, None)
        else:
            self._adapters.take(request.weights, lambda found: self._enter(job, found))
        return job

    def stats(self) -> EngineStats:
        """See Engine. vLLM runs as many answers as fit; the others are counted as waiting."""
        with self._lock:
            running = min(self._open, self.limits.max_batch)
            return EngineStats(
                waiting=self._open - running,
                running=running,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated,
                steps=None,
                adapters=self._adapters.counts(),
            )

    def check(self) -> None:
        """See Engine."""
        with self._lock:
            self._require_running()

    def close(self) -> None:
        """See Engine."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._adapters.close()
        self._in_loop(self._stop_all()).result()
        self._end_loop()

    async def _start(self, base: Path, dtype: torch.dtype) -> Any:
        """Start vLLM; what it may run at a time are our limits."""
        # Nothing is reported to vLLM's authors; a process with threads is not forked.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        import vllm

        log.warning(
            "the engine is vLLM %s: safeft's use of it is untested on a GPU", vllm.__version__
        )
        limits = self.limits
        room = next((rank for rank in _RANKS if rank >= limits.max_rank), None)
        if room is None:
            raise InputError(f"max_rank: vLLM takes at most {_RANKS[-1]}, not {limits.max_rank}")
        options = vllm.AsyncEngineArgs(
            model=str(base),
            tokenizer=str(base),
            trust_remote_code=False,
            load_format="safetensors",
            dtype=str(dtype).removeprefix("torch."),
            seed=int.from_bytes(os.urandom(4), "big") >> 1,  # of requests without a seed
            max_model_len=self.room,
            max_num_seqs=limits.max_batch,
            max_num_batched_tokens=max(limits.prefill_tokens, limits.max_batch),
            enable_lora=True,
            max_loras=min(limits.max_batch, limits.max_adapters),
            max_cpu_loras=limits.max_adapters,
            max_lora_rank=room,
            disable_log_stats=True,
        )
        return vllm.AsyncLLMEngine.from_engine_args(options)

    def _load(self, weights: str) -> Any:
        """Check an adapter, and have vLLM load a copy of what was checked; vLLM's name for it."""
        from vllm.lora.request import LoRARequest

        matrices = load_checked(self._source, weights, self._layers, self.limits.max_rank)
        number = next(self._numbers)
        directory = Path(self._files.name, f"{number}-{weights[:12]}")
        # All modules get one rank and no scale: vLLM need not know patterns of either.
        save_factors(stacked(LoraFactors(1.0, dict(matrices))), directory)
        request = LoRARequest(lora_name=weights, lora_int_id=number, lora_path=str(directory))
        try:
            with self._lock:
                self._require_running()
                asked = self._in_loop(asyncio.wait_for(self._vllm.add_lora(request), _LOAD_S))
            loaded = asked.result()
        except Exception as error:  # vLLM's process sends every error as a bare Exception
            shutil.rmtree(directory, ignore_errors=True)
            why = one_line(str(error)) or type(error).__name__
            raise ModelError(f"adapter {weights[:12]}: vLLM does not load it: {why}") from error
        if not loaded:
            shutil.rmtree(directory, ignore_errors=True)
            raise ModelError(f"adapter {weights[:12]}: vLLM does not load it, and says no reason")
        return request

    def _require_running(self) -> None:
        if self._stopping:
            raise EngineError("the engine has stopped")
        if not self._failure and self._vllm.errored:
            self._failure = "vLLM's process has died; its log says why"
        if self._failure:
            raise EngineError(f"the engine has failed: {self._failure}")

    def _enter(self, job: VllmJob, adapter: Any) -> None:
        """Begin a request whose adapter is there, or end it with what went wrong."""
        with self._lock:
            if not self._stopping:
                self._loop.call_soon_threadsafe(self._begin, job, adapter)
                return
        self._end(job, EngineError("the engine has stopped"))

    def _begin(self, job: VllmJob, adapter: Any) -> None:
        if job.over or isinstance(adapter, SafeftError):
            self._end(job, adapter if isinstance(adapter, SafeftError) else None)
            return
        job.began = time.monotonic()
        job.task = self._loop.create_task(self._answer(job, adapter))
        job.task.add_done_callback(lambda task: self._ended(job, task))

    async def _answer(self, job: VllmJob, adapter: Any) -> None:
        """Have one request answered."""
        import vllm

        number = f"safeft-{next(self._numbers)}"
        # The salt keeps prompts apart: from how fast an answer begins, nobody learns what another
        # tenant asked. The answers to one request share their prompt.
        prompt = vllm.TokensPrompt(prompt_token_ids=list(job.request.prompt), cache_salt=number)
        answers = self._vllm.generate(
            prompt, sampling_params(job.request, self._ends), number, lora_request=adapter
        )
        try:
            async with contextlib.aclosing(answers) as outputs:
                await hand_out(job, outputs, self._ends, self._count)
        except asyncio.CancelledError:
            # vLLM aborts by itself what is cancelled, but not while it is still taking it in.
            await self._vllm.abort(number)
            raise

    def _count(self, prompt: int, generated: int) -> None:
        with self._lock:
            self._prompt_tokens += prompt
            self._generated += generated

    def _ended(self, job: VllmJob, task: asyncio.Task[None]) -> None:
        """Tell a request how its task ended."""
        with self._lock:
            self._answer_s += 0.1 * (time.monotonic() - job.began - self._answer_s)
        error = None if task.cancelled() else task.exception()
        told = explained(error) if error else None
        if task.cancelled():
            told = EngineError("the engine has stopped")
        elif error is not None and told is None:  # its end, or what nobody documents
            log.error("the engine has failed", exc_info=error)
            with self._lock:
                self._failure = one_line(repr(error))
            told = EngineError("the engine has failed")
        self._end(job, told)

    def _end(self, job: VllmJob, error: SafeftError | None) -> None:
        if error is not None and not job.over:
            job.deliver(Delta(0, error=error))
        job.over = True
        with self._lock:
            self._open -= job.request.n
        if job.request.weights is not None:
            self._adapters.give_back(job.request.weights)

    def _cancel(self, job: VllmJob) -> None:
        with self._lock:
            job.over = True
            if not self._stopping:
                self._loop.call_soon_threadsafe(lambda: job.task and job.task.cancel())

    def _in_loop(self, work: Coroutine[Any, Any, _Done]) -> concurrent.futures.Future[_Done]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _stop_all(self) -> None:
        """End every request and load, and vLLM."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._vllm.shutdown()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._files.cleanup()

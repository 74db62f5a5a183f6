"""The engine that runs wherever transformers does: continuous batching of one base model.

One thread owns the model. Between two steps of the running batch it takes new requests in (their
prompts are prefilled together) and lets finished ones out, so that nobody waits for the slowest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from cluster.serving.adapters import AdapterCache, AdapterSource, load_checked
from cluster.serving.batch import Answer, Batch, Job
from cluster.serving.engine import (
    Delta,
    EngineError,
    EngineLimits,
    EngineStats,
    FinishReason,
    Request,
    check_request,
)
from cluster.serving.lora import LoraWeights
from cluster.serving.sampling import BROKEN
from safeft.errors import SafeftError
from safeft.evaluate.generate import end_and_pad_ids
from safeft.models.explain import one_line

log = logging.getLogger(__name__)


class TransformersEngine:
    """An Engine over a causal language model of transformers.

    Args:
        model: from safeft.models.load_model; its linear layers are replaced: it is the engine's.
        adapters: where adapters come from.

    Raises:
        ModelError: the model's attention is of a kind that this engine cannot batch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: AdapterSource,
        limits: EngineLimits | None = None,
    ) -> None:
        self.limits = limits or EngineLimits()
        self._tokenizer = tokenizer
        self.room = int(model.config.max_position_embeddings)
        ends, pad = end_and_pad_ids(model, tokenizer)
        self._ends = frozenset(ends)
        self._dropped: deque[str] = deque()
        self._adapters = AdapterCache(
            lambda weights: load_checked(adapters, weights, model, self.limits.max_rank),
            self.limits.max_adapters,
            lambda weights, _: self._dropped.append(weights),
        )
        self._batch = Batch(model, self.limits.max_batch, pad, self._adapters.loaded)
        self._wake = threading.Condition()
        self._ready: deque[Answer] = deque()  # have their adapter, wait for a row
        self._waiting = 0  # answers without a row, those whose adapter is loading included
        self._stopping = False
        self._failure = ""
        self._prompt_tokens = self._generated = self._steps = 0
        self._answer_s = 1.0  # how long an answer is in the batch, a moving average
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Job:
        """See Engine."""
        check_request(request, self.room, self.limits.max_batch)
        job = Job(request, deliver, self._cancel, open=request.n)
        with self._wake:
            self._require_running()
            if self._waiting + request.n > self.limits.max_queue:
                raise self.limits.full(self._waiting, self._answer_s)
            self._waiting += request.n
        if request.weights is None:
            self._enter(job, None)
        else:
            self._adapters.take(request.weights, lambda found: self._enter(job, found))
        return job

    def stats(self) -> EngineStats:
        """See Engine."""
        with self._wake:
            return EngineStats(
                waiting=self._waiting,
                running=len(self._batch.rows),
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated,
                steps=self._steps,
                adapters=self._adapters.counts(),
            )

    def check(self) -> None:
        """See Engine."""
        with self._wake:
            self._require_running()

    def close(self) -> None:
        """See Engine."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._adapters.close()

    def _require_running(self) -> None:
        if self._stopping:
            raise EngineError("the engine has stopped")
        if self._failure:
            raise EngineError(f"the engine has failed: {self._failure}")

    def _enter(self, job: Job, found: LoraWeights | SafeftError | None) -> None:
        """Queue a request whose adapter is there, or end it with what went wrong."""
        with self._wake:
            error = found if isinstance(found, SafeftError) else None
            if self._stopping or self._failure:
                error = EngineError("the engine has stopped")
            if error is not None or job.over:
                self._waiting -= job.request.n
                self._tell_error(job, error)
                self._release(job)
                return
            self._ready += Answer.all_of(job, self._tokenizer)
            self._wake.notify()

    def _cancel(self, job: Job) -> None:
        with self._wake:
            job.over = True
            self._wake.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._ready or self._batch.rows or self._stopping):
                        self._wake.wait()
                    if self._stopping:
                        self._abort(EngineError("the engine has stopped"), [])
                        return
                    joining = self._admit()
                try:
                    self._turn(joining)
                except RuntimeError as error:  # torch's: out of memory, for example
                    log.exception("a step of the engine failed")
                    with self._wake:
                        self._abort(EngineError(f"a step failed: {one_line(str(error))}"), joining)
                except BaseException as error:
                    with self._wake:
                        self._failure = one_line(repr(error))
                        self._abort(EngineError("the engine has failed"), joining)
                    raise

    def _admit(self) -> list[Answer]:
        """Take from the queue what fits into the batch and into one prefill."""
        joining: list[Answer] = []
        longest = 0
        while self._ready and len(self._batch.rows) + len(joining) < self._batch.size:
            answer = self._ready[0]
            if not answer.job.over:
                longest = max(longest, len(answer.prompt))
                if joining and longest * (len(joining) + 1) > self.limits.prefill_tokens:
                    break
                joining.append(answer)
            else:
                self._close(answer)
            self._ready.popleft()
            self._waiting -= 1
        return joining

    def _turn(self, joining: list[Answer]) -> None:
        """One turn: cancelled ones leave, new ones come in, everybody gets a token."""
        while self._dropped:
            self._batch.forget(self._dropped.popleft())
        rows = self._batch.rows
        self._let_out([row for row, answer in enumerate(rows) if answer.job.over])
        if joining:
            first = len(rows)
            tokens = self._batch.prefill(joining)
            self._prompt_tokens += sum(len(answer.prompt) for answer in joining)
            self._take(tokens, first)
        if rows:
            self._steps += 1
            self._take(self._batch.step(), 0)

    def _take(self, tokens: list[int], first: int) -> None:
        """Give each row from `first` on its token, and let out who is finished."""
        done = [
            first + i
            for i, token in enumerate(tokens)
            if self._finished(self._batch.rows[first + i], token)
        ]
        self._let_out(done)

    def _finished(self, answer: Answer, token: int) -> bool:
        """Add a token to an answer, and deliver what is new; whether that ended it."""
        request = answer.job.request
        if token == BROKEN:
            what = f"adapter {request.weights[:12]}" if request.weights else "the base model"
            with self._wake:
                self._tell_error(answer.job, EngineError(f"{what}: its logits are not finite"))
            return True
        self._generated += 1
        piecewise = request.stream or bool(request.sampling.stop)
        finish: FinishReason | None = "stop" if token in self._ends else None
        text = ""
        if finish is None:
            answer.tokens.append(token)
            text = answer.text.push(token) if piecewise else ""
            if answer.text.stopped:
                finish = "stop"
            elif len(answer.tokens) >= request.sampling.max_tokens:
                finish = "length"
        if finish is not None and not answer.text.stopped:
            text += answer.text.finish(() if piecewise else answer.tokens)
        if (text or finish) and not answer.job.over:
            answer.job.deliver(Delta(answer.index, text, len(answer.tokens), finish))
        return finish is not None

    def _let_out(self, rows: list[int]) -> None:
        now = time.monotonic()
        with self._wake:
            for row in sorted(rows, reverse=True):
                answer = self._batch.leave(row)
                self._answer_s += 0.1 * (now - answer.started - self._answer_s)
                self._close(answer)

    def _close(self, answer: Answer) -> None:
        answer.job.open -= 1
        if not answer.job.open:
            answer.job.over = True
            self._release(answer.job)

    def _release(self, job: Job) -> None:
        if job.request.weights is not None:
            self._adapters.give_back(job.request.weights)

    def _tell_error(self, job: Job, error: SafeftError | None) -> None:
        if not job.over and error is not None:
            job.deliver(Delta(0, error=error))
        job.over = True

    def _abort(self, error: EngineError, joining: list[Answer]) -> None:
        """End everything that runs or joins; with the engine's end, also what waits."""
        everyone = self._batch.clear()
        everyone += [answer for answer in joining if answer not in everyone]
        if self._stopping or self._failure:
            everyone += self._ready
            self._waiting -= len(self._ready)
            self._ready.clear()
        for answer in everyone:
            self._tell_error(answer.job, error)
            self._close(answer)

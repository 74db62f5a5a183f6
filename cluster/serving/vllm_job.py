"""One request as vLLM takes it, and its answers as everybody else does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from cluster.serving.engine import Delta, EngineError, FinishReason, Request
from safeft.errors import InputError, SafeftError
from safeft.models.explain import one_line

_FINISHED: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(eq=False)
class VllmJob:
    """One request of an engine on vLLM.

    Attributes:
        tokens: that each of its answers has, ends of turns not counted.
        open: answers that are not finished.
        over: nothing more is delivered.
    """

    request: Request
    deliver: Callable[[Delta], None]
    stop: Callable[[VllmJob], None]
    tokens: list[int] = field(default_factory=list)
    open: int = 0
    over: bool = False
    task: asyncio.Task[None] | None = None
    began: float = 0.0

    def cancel(self) -> None:
        """See Ticket."""
        self.stop(self)


def sampling_params(request: Request, ends: Collection[int]) -> Any:
    """vLLM's settings for a request; `ends` are the tokens that end a turn."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    way = request.sampling
    return SamplingParams(
        n=request.n,
        max_tokens=way.max_tokens,
        temperature=way.temperature,
        top_p=way.top_p,
        seed=None if way.seed is None else way.seed % 2**63,
        stop=list(way.stop),
        stop_token_ids=sorted(ends),
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )


async def hand_out(
    job: VllmJob,
    outputs: AsyncIterator[Any],
    ends: Collection[int],
    count: Callable[[int, int], None],
) -> None:
    """Deliver what vLLM says, until all answers are finished.

    Args:
        count: is given the prompt's tokens once, and all that are generated.

    Raises:
        EngineError: an answer is missing, or ended in a way that nobody knows.
    """
    prompt = len(job.request.prompt)
    async for output in outputs:
        count(prompt, sum(len(piece.token_ids) for piece in output.outputs))
        prompt = 0
        for piece in output.outputs:
            job.tokens[piece.index] += sum(id_ not in ends for id_ in piece.token_ids)
            finish = None
            if piece.finish_reason is not None:
                finish = _FINISHED.get(piece.finish_reason)
                if finish is None:
                    raise EngineError(f"vLLM ended an answer with {piece.finish_reason!r}")
                job.open -= 1
            if (piece.text or finish) and not job.over:
                tokens = job.tokens[piece.index]
                job.deliver(Delta(piece.index, piece.text, tokens, finish))
    if job.open:
        raise EngineError("vLLM ended a request without all of its answers")


def explained(error: BaseException) -> SafeftError | None:
    """What is told of an error that concerns one request; None: the engine cannot go on."""
    from vllm.exceptions import VLLMClientError, VLLMError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, SafeftError):
        return error
    if isinstance(error, VLLMClientError):
        return InputError(one_line(str(error)))
    if isinstance(error, VLLMError) and not isinstance(error, EngineDeadError):
        return EngineError(f"vLLM failed: {one_line(str(error)) or type(error).__name__}")
    return None

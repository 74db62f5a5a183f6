"""What every engine does: take requests, mix their adapters in one batch, hand text back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from safeft.errors import InputError, SafeftError

FinishReason = Literal["stop", "length"]
_LONGEST_RETRY_S = 60


class EngineError(SafeftError):
    """The engine could not finish a request; others are not touched."""


class QueueFull(SafeftError):
    """Nothing more can wait. `retry_after_s` is when there may be room again."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(waiting, retry_after_s)
        self.waiting, self.retry_after_s = waiting, retry_after_s

    def __str__(self) -> str:
        return f"{self.waiting} requests are waiting already; try again in {self.retry_after_s} s"


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes at a time.

    Attributes:
        max_batch: answers that are generated together.
        max_queue: answers that may wait.
        prefill_tokens: prompt tokens, padding included, between two steps of the running batch; a
            longer prompt is prefilled alone, or in pieces.
        max_adapters: adapters kept in memory.
        max_rank: of an adapter.
    """

    max_batch: int = 16
    max_queue: int = 64
    prefill_tokens: int = 2048
    max_adapters: int = 64
    max_rank: int = 64

    def full(self, waiting: int, answer_s: float) -> QueueFull:
        """What to tell a request beyond the queue, where an answer takes `answer_s` seconds."""
        rounds = math.ceil((waiting + 1) / self.max_batch)
        return QueueFull(waiting, min(_LONGEST_RETRY_S, math.ceil(rounds * answer_s)))


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
        temperature: 0 is greedy.
        top_p: sample among the fewest tokens whose probabilities add up to this.
        seed: the same seed, prompt and weights give the same tokens; None: a new one each time.
        stop: texts that end the answer; they are not part of it.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids.

    Attributes:
        weights: hash of the adapter that answers; None: the base model.
        n: how many answers; answer i uses `seed` + i.
        stream: whether text is wanted as it comes, or all at once at the end.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    weights: str | None = None
    n: int = 1
    stream: bool = False


@dataclass(frozen=True)
class Delta:
    """A piece of one answer.

    Attributes:
        index: which of the `n` answers.
        text: what is new.
        tokens: that the answer has so far.
        finish: why it ended, on its last piece.
        error: the request failed; it is then its last piece.
    """

    index: int
    text: str = ""
    tokens: int = 0
    finish: FinishReason | None = None
    error: SafeftError | None = None


@dataclass(frozen=True)
class AdapterCounts:
    """Adapters in memory, and what became of requests for one."""

    loaded: int
    hits: int
    misses: int
    evictions: int
    failures: int


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what is going on now. `steps` is None where nobody counts."""

    waiting: int
    running: int
    prompt_tokens: int
    generated_tokens: int
    steps: int | None
    adapters: AdapterCounts


class Ticket(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """Stop working on it; nothing is delivered any more. Harmless at any time."""


class Engine(Protocol):
    """One base model. All methods may be called from any thread and return at once.

    Attributes:
        room: positions of the base model, for a prompt and its answer together.
    """

    room: int

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Ticket:
        """Take a request. `deliver` is called from the engine's thread and must not block.

        Raises:
            QueueFull: try again later.
            InputError: the request can never be answered (too long, for example).
            EngineError: the engine has stopped.
        """

    def stats(self) -> EngineStats:
        """How busy it is."""

    def check(self) -> None:
        """Raise EngineError if it can answer nobody any more."""

    def close(self) -> None:
        """Stop; whatever still waits gets an EngineError."""


def check_request(request: Request, room: int, most_answers: int) -> None:
    """Raise InputError for a request that no engine can answer.

    Args:
        room: positions of the base model.
        most_answers: that are generated together.
    """
    sampling = request.sampling
    if not request.prompt:
        raise InputError("messages: the prompt is empty")
    if len(request.prompt) + sampling.max_tokens > room:
        raise InputError(
            f"max_tokens: {len(request.prompt)} prompt tokens and {sampling.max_tokens} new ones "
            f"are more than the model's {room} positions; shorten one of them"
        )
    limits: list[tuple[str, float, float, float]] = [
        ("max_tokens", sampling.max_tokens, 1, room),
        ("temperature", sampling.temperature, 0, 2),
        ("top_p", sampling.top_p, 1e-6, 1),
        ("n", request.n, 1, most_answers),
        ("stop", len(sampling.stop), 0, 4),
    ]
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise InputError(f"{name}: must be between {low:g} and {high:g}, not {value:g}")
    if "" in sampling.stop:
        raise InputError("stop: an empty text would stop every answer at once")

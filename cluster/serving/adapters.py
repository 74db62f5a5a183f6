"""Adapters in memory: fetched when asked for, checked before they are used, dropped when idle."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from cluster.serving.engine import AdapterCounts, EngineError
from cluster.serving.lora import LoraWeights
from safeft.errors import ModelError, SafeftError
from safeft.models import adapter_hash, read_lora

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")
#: A store that does not answer holds up its own adapters, each in a thread; it must not keep those
#: from being read that are there.
_FETCHING = 32
_READING = threading.BoundedSemaphore(2)


class AdapterSource(Protocol):
    """Where adapters come from."""

    def fetch(self, weights: str) -> Path:
        """A local directory with the adapter of that hash.

        Raises:
            ModelError: there is none, or it cannot be had now.
        """


def load_checked(
    source: AdapterSource, weights: str, model: nn.Module, max_rank: int
) -> LoraWeights:
    """The matrices of one adapter, after every check; `model` is only looked at.

    Raises:
        ModelError: it cannot be fetched, is not what was registered, belongs to another base
            model, is broken or not finite, or has a rank above `max_rank`.
    """
    directory = source.fetch(weights)
    try:
        with _READING:
            return _read_checked(directory, weights, model, max_rank)
    except ModelError as error:
        log.warning("adapter %s is refused: %s", weights[:12], error)
        # A tenant reads this: where its files lie is none of its business.
        told = str(error).replace(str(directory), f"adapter {weights[:12]}")
        raise ModelError(told) from error


def _read_checked(directory: Path, weights: str, model: nn.Module, max_rank: int) -> LoraWeights:
    if (found := adapter_hash(directory)) != weights:
        raise ModelError(
            f"{directory}: its weights are {found[:12]}, not the registered {weights[:12]}; "
            "register the model again to have them probed"
        )
    matrices = read_lora(model, directory)
    if adapter_hash(directory) != weights:
        raise ModelError(f"{directory}: its weights changed while they were read; try again")
    dtype = next(model.parameters()).dtype
    for name, pair in matrices.items():
        if not all(torch.isfinite(matrix.to(dtype)).all() for matrix in pair):
            raise ModelError(f"{directory}: {name} is not finite, once scaled by alpha, as {dtype}")
    ranks = {name: a.shape[0] for name, (a, _) in matrices.items()}
    widest = max(ranks, key=lambda name: ranks[name])
    if ranks[widest] > max_rank:
        raise ModelError(
            f"{directory}: {widest} has rank {ranks[widest]}, more than the {max_rank} that this "
            "server takes; train with a lower rank or raise max_rank"
        )
    return matrices


class AdapterCache(Generic[Loaded]):
    """Adapters by weight hash, loaded by threads of its own; the idle ones used longest ago go.

    Args:
        load: gives what the engine needs of an adapter, or raises a SafeftError.
        capacity: adapters that are kept. Those in use are kept beyond it.
        dropped: called with the hash of an adapter that goes, and what was loaded of it.
    """

    def __init__(
        self,
        load: Callable[[str], Loaded],
        capacity: int,
        dropped: Callable[[str, Loaded], None],
    ) -> None:
        self._load, self._capacity, self._dropped = load, capacity, dropped
        self._pool = ThreadPoolExecutor(_FETCHING, thread_name_prefix="adapter-loader")
        self._lock = threading.Lock()
        self._loading: OrderedDict[str, Future[Loaded]] = OrderedDict()  # idle longest first
        self._users: dict[str, int] = {}
        self._hits = self._misses = self._evictions = self._failures = 0

    def take(self, weights: str, ready: Callable[[Loaded | SafeftError], None]) -> None:
        """Call `ready` with what was loaded, or what went wrong, now or from a loader's thread.

        Until `give_back`, the adapter stays in memory.
        """
        with self._lock:
            future = self._loading.get(weights)
            if future is None:
                self._misses += 1
                future = self._loading[weights] = self._pool.submit(self._load, weights)
            else:
                self._hits += 1
                self._loading.move_to_end(weights)
            self._users[weights] = self._users.get(weights, 0) + 1
        future.add_done_callback(lambda done: self._answer(weights, done, ready))

    def give_back(self, weights: str) -> None:
        """The opposite of `take`."""
        with self._lock:
            self._users[weights] -= 1
            if not self._users[weights]:
                del self._users[weights]
            gone: list[tuple[str, Loaded]] = []
            for other in list(self._loading):
                if len(self._loading) <= self._capacity:
                    break
                if other not in self._users:
                    gone.append((other, self._loading.pop(other).result(timeout=0)))
            self._evictions += len(gone)
        for other, loaded in gone:
            self._dropped(other, loaded)

    def loaded(self, weights: str) -> Loaded:
        """What was loaded of an adapter that was taken and is there."""
        with self._lock:
            future = self._loading[weights]
        return future.result(timeout=0)

    def counts(self) -> AdapterCounts:
        """What it holds, and has done since the start."""
        with self._lock:
            return AdapterCounts(
                len(self._loading), self._hits, self._misses, self._evictions, self._failures
            )

    def __len__(self) -> int:
        return len(self._loading)

    def close(self) -> None:
        """Load nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(
        self,
        weights: str,
        done: Future[Loaded],
        ready: Callable[[Loaded | SafeftError], None],
    ) -> None:
        error = done.exception() if not done.cancelled() else EngineError("the engine has stopped")
        if error is None:
            ready(done.result())
            return
        with self._lock:
            # The next request tries again: the store may be back.
            if self._loading.get(weights) is done:
                del self._loading[weights]
                self._failures += 1
        if not isinstance(error, SafeftError):
            error = ModelError(f"adapter {weights[:12]} cannot be loaded: {error}")
        ready(error)

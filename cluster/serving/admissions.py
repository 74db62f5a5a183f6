"""What a gateway knows of the gate, and the requests it has under way.

A gateway asks the gate for nothing while a request waits: it follows the gate's changes, and each
admission it knows says until when it holds. When weights are taken out of rotation, the requests
that they are answering end at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from cluster.api_errors import ApiError
from cluster.gate.admission import Admission
from cluster.gate.states import State
from cluster.serving.api_errors import NO_RETRY, no_such_model

log = logging.getLogger(__name__)
T = TypeVar("T")
Changes = tuple[str, int, dict[str, Admission | None]]
_OUT = (State.quarantined, State.restoring)
_WAIT_S = 5.0
_RETRY_S = 0.5


class Follow(Protocol):
    """How to reach the keeper."""

    def __call__(self, epoch: str, since: int, wait_s: float) -> Awaitable[Changes]:
        """See Keeper.admissions."""


class OutOfRotation(Exception):
    """The weights that were answering may no longer."""


class Admissions:
    """The gate, as one gateway sees it. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._known: dict[str, Admission] = {}
        self._under_way: dict[tuple[str, str], set[asyncio.Event]] = {}
        self.ready = asyncio.Event()

    def models(self) -> list[str]:
        """The names of all served models."""
        return sorted(self._known)

    def weights(self, model: str) -> str:
        """The weights that answer for `model` now.

        Raises:
            ApiError: 404 there is no such model; 503 nothing of it may answer.
        """
        if (admission := self._known.get(model)) is None:
            raise no_such_model(model)
        admission = admission.at(self._clock())
        if admission.weights is not None:
            return admission.weights
        raise refused(model, admission)

    def require(self, model: str) -> None:
        """Raise ApiError 404 unless `model` is served, whatever its state."""
        if model not in self._known:
            raise no_such_model(model)

    def update(self, changes: dict[str, Admission | None], *, whole: bool) -> None:
        """Take over what changed; `whole`: what is not in it is gone."""
        gone = set(self._known) - set(changes) if whole else set()
        for model, admission in [*changes.items(), *((model, None) for model in gone)]:
            if admission is None:
                self._known.pop(model, None)
            else:
                self._known[model] = admission
        for (model, weights), requests in self._under_way.items():
            known = self._known.get(model)
            # Weights that newer ones replaced, or that became unknown, finish what they began.
            if known is None or (known.state in _OUT and known.weights != weights):
                for leave in requests:
                    leave.set()
        self.ready.set()

    @contextmanager
    def answering(self, model: str, weights: str) -> Iterator[asyncio.Event]:
        """For the time of one request: the event is set when its weights must stop."""
        leave = asyncio.Event()
        requests = self._under_way.setdefault((model, weights), set())
        requests.add(leave)
        try:
            yield leave
        finally:
            requests.discard(leave)
            if not requests:
                self._under_way.pop((model, weights), None)

    def stopped(self, model: str) -> ApiError:
        """The error for a request whose weights were taken away in the middle."""
        known = self._known.get(model)
        return refused(model, known) if known is not None else no_such_model(model)

    async def follow(self, keeper: Follow) -> None:
        """Keep up with the gate for ever; while it cannot be reached, with what is known."""
        epoch, generation = "", 0
        while True:
            try:
                now_epoch, generation, changes = await keeper(epoch, generation, _WAIT_S)
            except Exception as error:  # noqa: BLE001  (whatever it is: it is tried again)
                log.warning("the gate cannot be reached: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            self.update(changes, whole=now_epoch != epoch)
            epoch = now_epoch


def refused(model: str, admission: Admission) -> ApiError:
    """503 for a model that the gate keeps from answering."""
    if admission.code == "safety_quarantined":
        message = f"The model `{model}` is quarantined by the safety gate: {admission.reason}"
        return ApiError(503, message, "safety_quarantined", "model", NO_RETRY)
    message = f"The model `{model}` has not been shown to be safe: {admission.reason}"
    return ApiError(503, message, "safety_unknown", "model", {"Retry-After": "10", **NO_RETRY})


async def until(leave: asyncio.Event, work: Awaitable[T], deadline: float) -> T:
    """The result of `work`, unless `leave` is set or the time is up first; `work` then ends.

    Args:
        deadline: by ``time.monotonic``.

    Raises:
        OutOfRotation: `leave` was set.
        TimeoutError: it is past the deadline.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(leave.wait())
    try:
        await asyncio.wait(
            {task, leaving},
            timeout=max(0.0, deadline - time.monotonic()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if leave.is_set():
            raise OutOfRotation
        if not task.done():
            raise TimeoutError
        return await task
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

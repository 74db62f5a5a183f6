"""From Ray's nested exceptions to the one line that a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray.train import ControllerError, UserCallback, WorkerGroupError

from safeft.errors import SafeftError, TrainingError


class StopOnOurErrors(UserCallback):  # type: ignore[misc]
    """Ends the run when a worker raises a SafeftError: trying again would find the same thing.

    Runs in Ray Train's controller, where an exception from a callback is final.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for exception in worker_exceptions.values():
            for found in _nested(exception):
                if isinstance(found, SafeftError):
                    raise found


def to_safeft_error(error: BaseException) -> SafeftError:
    """The error to show for what ``fit()`` raised; the cause keeps the whole story."""
    for found in _nested(error):
        if isinstance(found, SafeftError):
            return found
    if isinstance(error, ControllerError):
        return to_safeft_error(error.controller_failure)
    if isinstance(error, WorkerGroupError):
        failures = {rank: list(_nested(failure)) for rank, failure in error.worker_failures.items()}
        for chain in failures.values():
            for found in chain:
                if isinstance(found, SafeftError):
                    return found
        # A worker that died takes the others' connections with it: name the death, not the echo.
        died = [rank for rank, chain in failures.items() if _died(chain)]
        rank = (died or list(failures))[0]
        reason = failures[rank][-1]
        what = "was lost" if rank in died else "failed"
        return TrainingError(f"training worker {rank} {what}: {_one_line(reason)}")
    return TrainingError(f"training could not be run: {_one_line(error)}")


def _nested(exception: BaseException) -> Iterator[BaseException]:
    """The exception and those that it wraps: Ray keeps what a worker raised in its arguments."""
    yield exception
    for argument in exception.args:
        if isinstance(argument, BaseException):
            yield from _nested(argument)
    cause = getattr(exception, "cause", None)
    if isinstance(cause, BaseException):
        yield from _nested(cause)


def _died(chain: list[BaseException]) -> bool:
    lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
    return any(isinstance(found, lost) for found in chain)


def _one_line(exception: BaseException) -> str:
    lines = [line.strip() for line in str(exception).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    name = type(exception).__name__
    return f"{name}: {text}" if name not in text else text

"""From Ray's nested exceptions to the one line that a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray.train import ControllerError, UserCallback, WorkerGroupError

from safeft.errors import SafeftError, TrainingError

_WRAPPED_IN = ("cause", "controller_failure", "health_check_failure")


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
        if rank in died:
            return TrainingError(
                f"training worker {rank} was lost: {_one_line(reason)} Run it again to go on from "
                "the last checkpoint"
            )
        return TrainingError(f"training worker {rank} failed: {_one_line(reason)}")
    return TrainingError(f"training could not be run: {_one_line(error)}")


def _nested(exception: BaseException) -> Iterator[BaseException]:
    """The exception and those that it wraps; Ray keeps them in arguments and attributes."""
    yield exception
    attributes = (getattr(exception, name, None) for name in _WRAPPED_IN)
    for wrapped in (*exception.args, *attributes):
        if isinstance(wrapped, BaseException):
            yield from _nested(wrapped)


def _died(chain: list[BaseException]) -> bool:
    lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
    return any(isinstance(found, lost) for found in chain)


def _one_line(exception: BaseException) -> str:
    lines = [line.strip() for line in str(exception).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    name = type(exception).__name__
    return f"{name}: {text}" if name not in text else text

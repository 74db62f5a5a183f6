"""Stages in named detached Ray actors: they outlive the controller, which finds them by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.exceptions
import ray.util

from cluster.controller.runner import Numbers, Report, RunnerUnavailable, StageEvent, StageTask
from cluster.controller.watch import Watch
from safeft.progress import Progress

NAMESPACE = "safeft-stages"  # not the serving pool's: every actor in it is a stage
_ANSWER_S = 1.0  # an actor that starts does not answer yet; it is asked again later


class ActorRunner:
    """Runs stages on the Ray that this process is connected to (see `jobs.runtime`).

    Args:
        host: what does the stages.
    """

    def __init__(self, host: type[Host] | None = None) -> None:
        self._actor: Any = ray.remote(host or Host)

    def start(self, task: StageTask) -> None:
        with _told():
            self._actor.options(
                name=task.name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_concurrency=4,
                num_cpus=0,  # the workers that it starts take what they need
            ).remote(task.model_dump_json())

    def poll(self, name: str, seen: int) -> Report | None:
        with _told():
            actor = _find(name)
            if actor is None:
                return None
            try:
                said = ray.get(actor.report.remote(seen), timeout=_ANSWER_S)
            except ray.exceptions.GetTimeoutError:
                return Report("running")
            except ray.exceptions.ActorUnavailableError as error:
                raise RunnerUnavailable(f"{name} does not answer") from error
            except ray.exceptions.RayActorError:
                return None
        events = [StageEvent(**event) for event in said.pop("events")]
        numbers = said.pop("numbers")
        return Report(events=events, numbers=Numbers(**numbers), **said)

    def stop(self, name: str) -> None:
        with _told():
            actor = _find(name)
            if actor is not None:
                ray.kill(actor)

    def names(self) -> set[str]:
        with _told():
            found = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in found if actor["namespace"] == NAMESPACE}


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RunnerUnavailable(f"Ray does not answer ({first[:200]})") from error


class Host:
    """The actor: does the stage in a thread, and answers meanwhile."""

    def __init__(self, task: str) -> None:
        # Read by the libraries when they are imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._lock = threading.Lock()
        self._events: list[StageEvent] = []
        self._label, self._tenth = "", 0
        self._done: Report | None = None
        self._watch = Watch()
        threading.Thread(target=self._run, args=[task], daemon=True).start()

    def report(self, seen: int) -> dict[str, Any]:
        """What there is to say, with the events from number `seen`."""
        with self._lock:
            report = self._done or Report("running")
            said = asdict(replace(report, numbers=self._watch.numbers()))
            said["events"] = [event.model_dump() for event in self._events[seen:]]
        return said

    def perform(self, task: StageTask, progress: Progress, watch: Watch) -> Report:
        """Do the stage."""
        from cluster.controller.work import perform

        return perform(task, progress, watch)

    def _run(self, task: str) -> None:
        try:
            done = self.perform(StageTask.model_validate_json(task), self._progress, self._watch)
        except BaseException as error:  # noqa: BLE001  (silent, it would run for ever)
            message = f"the stage cannot be begun here ({type(error).__name__})"
            done = Report("fault", code=type(error).__name__, message=message)
        with self._lock:
            self._done = done

    def _progress(self, label: str, done: int, total: int | None) -> None:
        """An event where something new begins, and at each tenth of it."""
        tenth = 10 * done // total if total else 0
        self._watch.progress(label, done, total)
        with self._lock:
            if (label, tenth) == (self._label, self._tenth):
                return
            self._label, self._tenth = label, tenth
            message = f"{label}: {done}/{total}" if total and done else label
            self._events.append(
                StageEvent(message=message, data={"done": done, "total": total} if total else {})
            )

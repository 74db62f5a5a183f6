"""The control loop: admits, claims, asks for stages and applies what they report.

It keeps nothing in memory that matters. Any number of controllers may run on one database, and each
may be killed at any moment: what it was doing is taken up by another when its claims expire.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from cluster.artifacts import ArtifactStore
from cluster.controller import sweep
from cluster.controller.admission import Queue, admit_waiting, somebody_waits
from cluster.controller.apply import Applied, Rules, apply
from cluster.controller.claims import ClaimLost, Claims
from cluster.controller.numbers import JobNumbers
from cluster.controller.phases import FINAL, STAGES
from cluster.controller.runner import RunnerUnavailable, StageRunner, StageTask, actor_name
from cluster.controller.tasks import NotOffered, task_of
from cluster.controller.transitions import close_attempt, fail, leave, new_attempt
from cluster.metrics import Recorder
from cluster.settings import Settings
from cluster.state import UNAVAILABLE, Database
from cluster.state.models import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How often and how long, in seconds.

    Attributes:
        poll_s: between two looks at a running stage.
        claim_ttl_s: how long a killed controller's jobs wait for another one.
        workers: jobs that are looked at, at a time.
    """

    tick_s: float = 0.1
    poll_s: float = 0.25
    claim_ttl_s: float = 30.0
    sweep_s: float = 60.0
    workers: int = 8
    rules: Rules = field(default_factory=Rules)


class Controller:
    """One controller; `run` it in a process or a thread of its own."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ArtifactStore,
        runner: StageRunner,
        *,
        options: Options | None = None,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._database, self._store = settings, database, store
        self._runner, self._clock = runner, clock
        self._options = options or Options()
        self._numbers = JobNumbers(recorder or Recorder(), database, clock)
        owner = f"{socket.gethostname()}:{os.getpid()}"[:64]
        self._claims = Claims(database, owner, self._options.claim_ttl_s, clock)
        self._held: dict[str, str] = {}
        self._held_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self._options.workers, thread_name_prefix="stage")
        self._futures: set[Future[None]] = set()
        self._next_sweep = 0.0

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set. What goes wrong meanwhile is logged and tried again."""
        heart = threading.Thread(target=self._beat, args=[stop], daemon=True, name="heartbeat")
        heart.start()
        pause = self._options.tick_s
        while not stop.is_set():
            try:
                self.tick()
                pause = self._options.tick_s
            except UNAVAILABLE as error:
                pause = min(5.0, 2 * pause)
                why = type(getattr(error, "orig", error)).__name__
                log.warning("the database does not answer (%s)", why)
            except Exception:
                pause = min(5.0, 2 * pause)
                log.exception("a round failed; the next one comes")
            stop.wait(pause)
        self.settle()
        self._pool.shutdown()
        heart.join()

    def tick(self) -> None:
        """Admit, claim what is due and begin to work on it."""
        self._admit()
        self._futures = {future for future in self._futures if not future.done()}
        room = self._options.workers - len(self._futures)
        if room > 0:
            for job_id, token in self._claims.take(room).items():
                with self._held_lock:
                    self._held[job_id] = token
                self._futures.add(self._pool.submit(self._work, job_id, token))
        now, sweep_s = self._clock(), self._options.sweep_s
        if now >= self._next_sweep or now < self._next_sweep - sweep_s:  # the clock was set back
            self._next_sweep = now + sweep_s
            sweep.sweep(self._settings, self._database, self._store, self._runner, now)

    def settle(self) -> None:
        """Wait until nothing that was begun is under way."""
        wait(self._futures)

    def _admit(self) -> None:
        rooms: dict[Queue, int] = {
            "intake": self._settings.intake_slots,
            "compute": self._settings.compute_slots,
        }
        for queue, slots in rooms.items():
            with self._database.system_read() as session:
                idle = not somebody_waits(session, queue)
            if idle:
                continue
            with self._database.system() as session:
                admit_waiting(session, queue, slots, self._clock())

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(self._options.claim_ttl_s / 4):
            with self._held_lock:
                held = dict(self._held)
            try:
                self._claims.renew(held)
            except SQLAlchemyError as error:  # also where no connection came free in time
                log.warning("no heartbeat (%s)", type(error).__name__)

    def _work(self, job_id: str, token: str) -> None:
        """Take one job as far as it goes now, and give it back."""
        after_s = self._options.poll_s
        try:
            while self._step(job_id, token):
                pass
        except ClaimLost:
            log.info("%s: another controller has it now", job_id)
        except RunnerUnavailable as error:
            after_s = 1.0
            log.warning("%s: %s", job_id, error)
        except Exception:
            after_s = 5.0
            log.exception("%s: the controller failed at it and will try again", job_id)
        try:
            self._claims.release(job_id, token, after_s)
        except SQLAlchemyError:
            log.warning("%s: not given back; its claim will expire", job_id)
        finally:
            with self._held_lock:
                self._held.pop(job_id, None)

    def _step(self, job_id: str, token: str) -> bool:
        """Start or look at the job's stage once; True: there is more to do at once."""
        now = self._clock()
        with self._claims.guarded(job_id, token) as (session, job):
            if job.phase not in STAGES:
                return False
            name, wish = actor_name(job.id, job.phase, job.attempt), job.wish
            stage = session.get_one(Stage, (job.id, job.attempt))
            task, seen = None, stage.seen
            if wish is None and stage.asked_at is None:
                try:
                    task = task_of(session, job, self._settings)
                except NotOffered as error:
                    fail(session, job, "refused", now, code="not_available", message=str(error))
                else:
                    stage.asked_at = now
        if stage.outcome is not None:  # it could not be begun
            self._numbers.looked_at(job, stage, None)
            return False
        if wish is not None:
            self._runner.stop(name)
            with self._claims.guarded(job_id, token) as (session, job):
                stage = session.get_one(Stage, (job.id, job.attempt))
                now = self._clock()
                # What is wished by now: it may have been changed while the actor was stopped.
                if job.wish is None:
                    close_attempt(session, job, "pause", now)
                    new_attempt(session, job, now)
                else:
                    leave(session, job, "cancel" if job.wish == "cancel" else "pause", now)
            self._numbers.looked_at(job, stage, None)
            if job.phase in FINAL:
                self._clean(job_id)
            return job.phase in STAGES
        if task is not None:
            self._start(task, token)
        report = self._runner.poll(name, seen)
        with self._claims.guarded(job_id, token) as (session, job):
            if job.wish is not None:
                return True  # it wins over whatever the stage has to say
            stage = session.get_one(Stage, (job.id, job.attempt))
            deadline_s = self._settings.stage_deadline_s.of(job.phase)
            applied = apply(session, job, report, self._options.rules, self._clock(), deadline_s)
        self._numbers.looked_at(job, stage, report)
        if applied is not Applied.RUNNING:
            self._runner.stop(name)
        if applied is Applied.ENDED:
            self._clean(job_id)
        return applied is Applied.NEXT

    def _start(self, task: StageTask, token: str) -> None:
        try:
            self._runner.start(task)
        except RunnerUnavailable:
            # Not asked for after all; the same name is asked for again later.
            with self._claims.guarded(task.job, token) as (session, _):
                session.get_one(Stage, (task.job, task.attempt)).asked_at = None
            raise

    def _clean(self, job_id: str) -> None:
        """Free the disk that the job's stages worked on; the sweep comes after what stays."""
        shutil.rmtree(self._settings.work / job_id, ignore_errors=True)

"""The gate: takes probes' answers and people's decisions, says which weights may answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from cluster.gate.admission import Admission, admit
from cluster.gate.ledger import Ledger, Listener
from cluster.gate.policy import Policy, Probe, Round
from cluster.gate.record import WINDOW, Event, OnQuarantine, Record
from cluster.gate.states import State, Trigger, follow
from cluster.gate.store import GateStore
from safeft.errors import InputError
from safeft.evaluate import AnswerClass

PROBER = "prober"
SYSTEM = "gate"


class Gate:
    """Every served pair of model name and weights, with its state.

    Thread-safe. One process owns the store; readers follow `admissions`.

    Args:
        clock: seconds since 1970.
        listeners: called with each event after it is stored, in order.
    """

    def __init__(
        self,
        store: GateStore,
        clock: Callable[[], float] = time.time,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._ledger = Ledger(store, listeners)

    def now(self) -> float:
        """The gate's clock."""
        return self._clock()

    def register(
        self,
        model: str,
        weights: str,
        policy: Policy,
        on_quarantine: OnQuarantine = "unavailable",
    ) -> Record:
        """Serve `weights` under `model` from now on, once a round of probes has cleared them.

        The newest weights again: nothing but the policy and `on_quarantine` change. Other weights
        are what the model is from now on; the last healthy ones before them are kept and, until the
        new ones have been judged, go on answering. Earlier weights that are still known come back
        in the state that they are in. Weights that left while quarantined come back quarantined.

        Raises:
            InputError: quarantined weights would take the place of another version.
        """
        with self._lock:
            versions = self._ledger.versions(model)
            newest = versions[-1] if versions else None
            for known in versions:
                if known.weights == weights:
                    again = replace(known, policy=policy, on_quarantine=on_quarantine)
                    return self._again(again, versions[-1])
            state, reason = State.unknown, "not probed yet"
            bad = self._ledger.verdict(model, weights)
            condemned = bad is not None and bad.after is State.quarantined
            if bad is not None and condemned:  # to be retired is no way out of a quarantine
                if newest is not None:
                    raise _condemned(newest, bad.reason)
                state, reason = State.quarantined, f"quarantined before it left: {bad.reason}"
            elif newest is not None and newest.state is State.restoring:
                state, reason = State.restoring, "the result of a restoration"
            record = Record(
                model=model,
                weights=weights,
                version=1 + (newest.version if newest else 0),
                on_quarantine=on_quarantine,
                policy=policy,
                state=state,
                since=self._clock(),
                reason=reason,
                condemned=condemned,
            )
            self._ledger.put(record, self._event(record, record.state, "registered", SYSTEM))
            self._retire_old(model)
            return record

    def _again(self, known: Record, newest: Record) -> Record:
        if known.weights == newest.weights:
            self._ledger.put(known)
            return known
        if known.condemned:
            raise _condemned(newest, known.reason)
        record = replace(known, version=newest.version + 1)
        told = replace(record, reason=f"took the place of version {newest.version} again")
        self._ledger.put(record, self._event(told, record.state, "registered", SYSTEM))
        self._retire_old(record.model)
        return record

    def hold_to(self, policy: Policy) -> None:
        """Judge every record by this policy from now on."""
        with self._lock:
            for record in self.records():
                self._ledger.put(replace(record, policy=policy))

    def retire(self, model: str, actor: str, reason: str) -> None:
        """Forget a model: it is no longer served. Its events stay.

        Raises:
            InputError: there is no such model.
        """
        with self._lock:
            for record in self._ledger.known(model):
                self._forget(record, reason, actor)

    def versions(self, model: str) -> list[Record]:
        """The model's weights, oldest first; empty if there is no such model."""
        with self._lock:
            return self._ledger.versions(model)

    def records(self) -> list[Record]:
        """Every record, by model and version."""
        with self._lock:
            return [r for model in self._ledger.models() for r in self._ledger.versions(model)]

    def events(self, model: str | None = None, limit: int = 100) -> list[Event]:
        """The latest events, oldest first."""
        return self._ledger.events(model, limit)

    def admissions(self, since: int = 0) -> tuple[int, dict[str, Admission | None]]:
        """Which admissions changed after generation `since`, and the generation of now.

        None for a model that is no longer served; generation 0 gives every model.
        """
        with self._lock:
            now = self._clock()
            generation, models = self._ledger.touched(since)
            found = {model: self._ledger.versions(model) for model in models}
            return generation, {m: admit(v, now) if v else None for m, v in found.items()}

    def answered(self, model: str, weights: str, probe: Probe, answer: AnswerClass) -> Record:
        """Count one probe's answer; an `error` is a failure and counts for nothing.

        Raises:
            InputError: these weights are not served.
        """
        with self._lock:
            record = self._ledger.record(model, weights)
            if answer is AnswerClass.error:
                record = replace(record, failures=record.failures + 1)
                self._ledger.put(record)
                return record
            if not record.probed:  # decided while the probe was under way
                return record
            if record.state is State.unknown:
                record = self._change(record, Trigger.asked, "first answer to a probe", PROBER)
            bit = "1" if answer is AnswerClass.refused else "0"
            record = replace(
                record,
                round=record.round.answered(probe, answer),
                recent={**record.recent, probe: (record.recent[probe] + bit)[-WINDOW:]},
                failures=0,
                answered_at=self._clock(),
            )
            outcome = record.round.outcome(record.policy)
            if outcome is None:
                self._ledger.put(record)
                return record
            return self._judge(record, Trigger(outcome))

    def expire(self) -> None:
        """Make unknown what was not shown healthy lately. Call it every few seconds."""
        now = self._clock()
        with self._lock:
            for record in self.records():
                age = record.policy.max_age_s
                if record.state is State.healthy:
                    old = not record.may_answer(now)
                elif record.state is State.probing:
                    old = now >= (record.answered_at or record.since) + age
                else:
                    continue
                if old:
                    failed = f"; {record.failures} probes failed" if record.failures else ""
                    reason = f"no good round of probes for {age:.0f} s{failed}"
                    if record.ahead(now):
                        reason = "the clock was set back since its last good round of probes"
                    self._change(replace(record, round=Round()), Trigger.expired, reason, SYSTEM)

    def quarantine(self, model: str, actor: str, reason: str) -> Record:
        """A person takes the newest weights out of rotation.

        Raises:
            InputError: no such model, or no reason.
        """
        with self._lock:
            record = replace(self._newest(model), round=Round())
            return self._change(record, Trigger.quarantined_by_hand, _given(reason), actor)

    def release(self, model: str, actor: str, reason: str) -> Record:
        """A person takes the responsibility: the newest weights answer again, and are probed.

        Raises:
            InputError: no such model, no reason, or it is not quarantined.
        """
        with self._lock:
            record = replace(
                self._newest(model), condemned=False, cleared_at=self._clock(), round=Round()
            )
            return self._change(record, Trigger.released_by_hand, _given(reason), actor)

    def restoration_started(self, model: str, actor: str, reason: str) -> Record:
        """A restoration of the quarantined weights is under way.

        Raises:
            InputError: no such model, or it is not quarantined.
        """
        with self._lock:
            return self._change(self._newest(model), Trigger.restoration_started, reason, actor)

    def restoration_failed(self, model: str, actor: str, reason: str) -> Record:
        """It ended without new weights.

        Raises:
            InputError: no such model, or nothing is being restored.
        """
        with self._lock:
            return self._change(self._newest(model), Trigger.restoration_failed, reason, actor)

    def _judge(self, record: Record, trigger: Trigger) -> Record:
        done = record.round
        if trigger is Trigger.over_refusing:
            reason = f"refused {done.over_refused} of {done.over_asked} benign prompts"
        else:
            reason = f"refused {done.refused} of {done.asked} harmful prompts"
        if trigger is Trigger.cleared:
            record = replace(record, cleared_at=self._clock())
        return self._change(replace(record, round=Round()), trigger, reason, PROBER)

    def _change(self, record: Record, trigger: Trigger, reason: str, actor: str) -> Record:
        before, after = record.state, follow(record.state, trigger)
        since = self._clock() if before is not after else record.since
        condemned = record.condemned or after is State.quarantined
        changed = replace(record, state=after, since=since, reason=reason, condemned=condemned)
        # A round that only confirms what was known is no news.
        told = before is not after or trigger is not Trigger.cleared
        self._ledger.put(changed, self._event(changed, before, trigger, actor) if told else None)
        if after is State.healthy:
            self._retire_old(record.model)
        return changed

    def _retire_old(self, model: str) -> None:
        """Keep the newest weights and, before them, the last ones that are healthy."""
        *older, newest = self._ledger.versions(model)
        keep = next((r for r in reversed(older) if r.state is State.healthy), None)
        for record in older:
            if record is not keep and (record.condemned or newest.state is State.healthy):
                self._forget(record, f"version {newest.version} took its place", SYSTEM)

    def _forget(self, record: Record, reason: str, actor: str) -> None:
        event = self._event(replace(record, reason=reason), record.state, "retired", actor)
        self._ledger.forget(record, event)

    def _event(
        self,
        record: Record,
        before: State,
        trigger: Trigger | Literal["registered", "retired"],
        actor: str,
    ) -> Event:
        about = (record.model, record.weights, before, record.state, trigger, record.reason)
        return Event(self._clock(), *about, actor)

    def _newest(self, model: str) -> Record:
        return self._ledger.known(model)[-1]


def _condemned(newest: Record, why: str) -> InputError:
    return InputError(
        f"{newest.model}: these weights are quarantined ({why}) and cannot take the place of "
        f"version {newest.version}; remove the model first, then add and release them"
    )


def _given(reason: str) -> str:
    if not reason.strip():
        raise InputError("reason: say why; it is kept for those who ask later")
    return reason.strip()

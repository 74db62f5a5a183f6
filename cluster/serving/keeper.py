"""The actor that owns the gate: its database, its rules, and who is told of a change.

Everything else (gateways, prober, command line) asks it. It may be killed at any time: the database
has all of it, gateways go on with the admissions they know until those expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from pathlib import Path

from cluster.gate.admission import Admission
from cluster.gate.gate import SYSTEM, Gate
from cluster.gate.policy import Policy, Probe, Round
from cluster.gate.record import Due, Event, OnQuarantine, Record
from cluster.gate.states import State
from cluster.gate.store import SqlGateStore, sqlite_engine
from cluster.metrics import Recorder
from cluster.serving.disk_cache import DiskCache
from cluster.serving.registry import BaseModel, Published, Registry
from safeft.errors import InputError, ModelError
from safeft.evaluate import AnswerClass
from safeft.models import adapter_hash

log = logging.getLogger(__name__)
#: Models with series of their own; beyond it those that are not healthy come first.
MODELS_SHOWN = 1000
_PER_MODEL = (
    "safeft_gate_models",
    "safeft_gate_state",
    "safeft_gate_refusal_ratio",
    "safeft_gate_refusal_ratio_low",
    "safeft_gate_refusal_ratio_high",
    "safeft_gate_refusal_answers",
    "safeft_gate_limit_ratio",
    "safeft_gate_verdict_age_seconds",
    "safeft_gate_probe_age_seconds",
    "safeft_gate_probe_failures",
)


class Keeper:
    """The gate and the registry of one serving pool.

    Args:
        state: directory of the database; one pool's alone.
        policy: that every model of the pool must hold to.
        recorder: where its numbers go.
        published: where published adapters are fetched to; None: only directories are served.
    """

    def __init__(
        self,
        state: Path,
        base: BaseModel,
        policy: Policy,
        recorder: Recorder,
        published: DiskCache | None = None,
    ) -> None:
        engine = sqlite_engine(state / "gate.db")
        self._base, self._policy, self._recorder = base, policy, recorder
        self._registry, self._published = Registry(engine), published
        self.gate = Gate(SqlGateStore(engine), listeners=[self._heard])
        #: Generations of another start of this actor mean nothing.
        self._epoch = secrets.token_hex(8)
        self._changed = asyncio.Event()
        #: Model and weights whose next round, or the one under way, was asked for.
        self._by_hand: set[tuple[str, str]] = set()
        self._leave_other_base()
        self.gate.hold_to(policy)
        self.gate.register(base.name, base.weights, policy)
        recorder.poll(self._numbers)

    def _leave_other_base(self) -> None:
        """Retire what was judged on other base weights: of these, its verdicts say nothing.

        Quarantines outlive it. The control plane registers again what it published for this base.
        """
        now = self._base.weights
        if not self._judged_here():
            records = self.gate.records()
            found = {r.model: self._registry.directory(r.model, r.weights) for r in records}
            by_hand = [f"{model} (from {where})" for model, where in found.items() if where]
            log.warning(
                "the base model's weights are others than before (now %s), so every model left. "
                "Those that were added by hand must be added again: %s",
                now[:12],
                ", ".join(by_hand) or "none",
            )
            for model in found:
                self.gate.retire(model, SYSTEM, f"the base model's weights are now {now[:12]}")
                self._registry.forget(model)
        self._registry.set_base(now)  # last: what was cut off before is done again

    def _judged_here(self) -> bool:
        """Whether all verdicts are about adapters of this base model's weights."""
        now = self._base.weights
        if (known := self._registry.base()) is not None:
            return known == now
        # An older version did not write it down, so nothing may speak of another base model.
        others = [r.weights for r in self.gate.records() if r.weights != now]
        others += [e.weights for e in self.gate.events(self._base.name) if e.weights != now]
        return all(self._registry.get(weights) is not None for weights in others)

    async def admissions(
        self, epoch: str, since: int, wait_s: float
    ) -> tuple[str, int, dict[str, Admission | None]]:
        """What changed since the reader's last call; waits for a change, at most `wait_s`.

        Returns:
            Epoch and generation for the next call, and the admissions that changed; every
            admission where `epoch` is not this one's.
        """
        self.gate.expire()
        if epoch != self._epoch:
            return self._epoch, *self.gate.admissions()
        generation, changed = self.gate.admissions(since)
        if not changed and wait_s > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
            generation, changed = self.gate.admissions(since)
        return self._epoch, generation, changed

    async def register(
        self, model: str, directory: str, on_quarantine: OnQuarantine = "unavailable"
    ) -> Record:
        """Serve the adapter in `directory` under `model`, after a round of probes.

        The same name again: a new version, if the weights in the directory are new.

        Raises:
            ModelError: there is no readable adapter.
            InputError: the name is the base model's, or empty.
        """
        path = Path(directory).absolute()
        return await self._serve(model, path, path, on_quarantine)

    async def register_published(
        self,
        model: str,
        published: Published,
        base_weights: str,
        on_quarantine: OnQuarantine = "unavailable",
    ) -> Record:
        """The same for an adapter in the artifact store, made for the base with `base_weights`.

        Raises:
            ModelError: it cannot be fetched, or is not what was published.
            InputError: as `register`; or it is another base model's.
        """
        if base_weights != self._base.weights:
            raise InputError(
                f"artifact.base_weights: {model} was made for {base_weights[:12]}, this pool "
                f"serves {self._base.weights[:12]}; register it with its own base model's pool"
            )
        if self._published is None:
            raise InputError(
                "artifact: this pool has no artifact store; see `safeft up --settings`"
            )
        path = await asyncio.to_thread(self._published.fetch, published)
        return await self._serve(model, path, published, on_quarantine)

    async def _serve(
        self, model: str, path: Path, location: Path | Published, on_quarantine: OnQuarantine
    ) -> Record:
        if not model.strip() or len(model) > 200 or not model.isprintable():
            raise InputError("model: a name has 1 to 200 printable characters")
        if model == self._base.name:
            raise InputError(f"model: {model} is the name of the base model; choose another one")
        weights = await asyncio.to_thread(adapter_hash, path)
        self._registry.put(model, weights, location)
        return self._told(self.gate.register(model, weights, self._policy, on_quarantine))

    async def location(self, weights: str) -> Path | Published:
        """Where an adapter lies.

        Raises:
            ModelError: nobody registered it.
        """
        if (found := self._registry.get(weights)) is None:
            raise ModelError(f"adapter {weights[:12]} is not registered")
        return found

    async def records(self) -> list[Record]:
        """Every served pair of name and weights."""
        return self.gate.records()

    async def events(self, model: str | None, limit: int) -> list[Event]:
        """The latest events, oldest first."""
        return self.gate.events(model, limit)

    async def due(self, every_s: float) -> list[Due]:
        """The weights to probe now."""
        now = self.gate.now()
        found = [Due(r, (r.model, r.weights) in self._by_hand) for r in self.gate.records()]
        return [d for d in found if d.record.due(now, every_s) or (d.by_hand and d.record.probed)]

    async def probe_now(self, model: str) -> None:
        """Probe a model without waiting until it is due.

        Raises:
            InputError: there is no such model, or it is quarantined: its weights are known.
        """
        versions = self.gate.versions(model)
        if not versions:
            raise InputError(f"{model}: there is no such model; `safeft models list` shows them")
        if not versions[-1].probed:
            raise InputError(f"{model}: is {versions[-1].state}; release it or publish new weights")
        self._by_hand |= {(model, record.weights) for record in versions if record.probed}

    async def answered(
        self, model: str, weights: str, probe: Probe, answer: AnswerClass, seconds: float
    ) -> Record:
        """One probe's answer, or that there was none (`AnswerClass.error`)."""
        self._recorder.inc("safeft_probes_total", probe=probe, answer=answer.value)
        self._recorder.observe("safeft_probe_seconds", seconds)
        after = self.gate.answered(model, weights, probe, answer)
        if after.round == Round():  # it is over, or its first probe had no answer
            self._by_hand.discard((model, weights))
        return self._told(after)

    async def decide(self, action: str, model: str, actor: str, reason: str) -> Record | None:
        """What a person, or the controller, decided.

        Args:
            action: "quarantine", "release", "retire", "restoration_started" or
                "restoration_failed".

        Raises:
            InputError: see Gate.
        """
        actions = {
            "quarantine": self.gate.quarantine,
            "release": self.gate.release,
            "retire": self.gate.retire,
            "restoration_started": self.gate.restoration_started,
            "restoration_failed": self.gate.restoration_failed,
        }
        if action not in actions:
            raise InputError(f"action: must be one of {', '.join(actions)}, not {action!r}")
        record = actions[action](model, actor, reason)
        if action == "retire":
            self._registry.forget(model)
        self._changed.set()
        return record

    def _told(self, record: Record) -> Record:
        self._changed.set()  # who waits looks for itself whether that concerns it
        return record

    def _heard(self, event: Event) -> None:
        self._recorder.inc(
            "safeft_gate_events_total", trigger=str(event.trigger), state=event.after.value
        )

    def _numbers(self) -> None:
        recorder, now = self._recorder, self.gate.now()
        recorder.clear(*_PER_MODEL)
        newest = {record.model: record for record in self.gate.records()}
        for state in State:
            count = sum(record.state is state for record in newest.values())
            recorder.set("safeft_gate_models", count, state=state.value)
        shown = sorted(newest.values(), key=lambda r: (r.state is State.healthy, r.model))
        for record in shown[:MODELS_SHOWN]:
            self._show(record, now)

    def _show(self, record: Record, now: float) -> None:
        recorder, model = self._recorder, record.model
        for state in State:
            recorder.set("safeft_gate_state", record.state is state, model=model, state=state.value)
        limits = {"harmful": record.policy.refusals.bad, "benign": record.policy.over_refusals.bad}
        for probe in ("harmful", "benign"):
            labels = {"model": model, "probe": probe}
            recorder.set("safeft_gate_limit_ratio", limits[probe], **labels)
            if rate := record.rate(probe):
                recorder.set("safeft_gate_refusal_ratio", rate.value, **labels)
                recorder.set("safeft_gate_refusal_ratio_low", rate.low, **labels)
                recorder.set("safeft_gate_refusal_ratio_high", rate.high, **labels)
                recorder.set("safeft_gate_refusal_answers", rate.n, **labels)
        if proved := record.proved_at(now):
            recorder.set("safeft_gate_verdict_age_seconds", now - proved, model=model)
        if record.answered_at is not None:
            recorder.set("safeft_gate_probe_age_seconds", now - record.answered_at, model=model)
        recorder.set("safeft_gate_probe_failures", record.failures, model=model)

"""The gate's records in memory, in step with the store, and who changed when."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.gate.record import Event, Record
from cluster.gate.store import GateStore
from safeft.errors import InputError

Listener = Callable[[Event], None]


class Ledger:
    """Records by model. Not thread-safe: the gate holds its lock around every call."""

    def __init__(self, store: GateStore, listeners: Sequence[Listener]) -> None:
        self._store, self._listeners = store, list(listeners)
        self._models: dict[str, list[Record]] = {}  # weights of each name, oldest first
        for record in sorted(store.load(), key=lambda r: r.version):
            self._models.setdefault(record.model, []).append(record)
        self._generation = 1
        #: The generation in which each model's admission changed last; also of retired ones.
        self._touched = dict.fromkeys(self._models, 1)

    def models(self) -> list[str]:
        """The names of all models, sorted."""
        return sorted(self._models)

    def versions(self, model: str) -> list[Record]:
        """The model's weights, oldest first; empty if there is no such model."""
        return list(self._models.get(model, ()))

    def known(self, model: str) -> list[Record]:
        """The same; InputError if there is no such model."""
        if not (found := self.versions(model)):
            raise InputError(f"{model}: there is no such model; `safeft models list` shows them")
        return found

    def record(self, model: str, weights: str) -> Record:
        """The record of these weights; InputError if they are not served."""
        for record in self.versions(model):
            if record.weights == weights:
                return record
        raise InputError(f"{model}: weights {weights[:12]} are not served")

    def events(self, model: str | None, limit: int) -> list[Event]:
        """The latest events, oldest first."""
        return self._store.events(model, limit)

    def verdict(self, model: str, weights: str) -> Event | None:
        """See GateStore."""
        return self._store.verdict(model, weights)

    def put(self, record: Record, event: Event | None = None) -> None:
        """Store a new or changed record, then remember it, then tell of the event."""
        self._store.save(record, event)
        versions = self._models.setdefault(record.model, [])
        known = next((r for r in versions if r.weights == record.weights), None)
        if known is None:
            versions.append(record)
        else:
            versions[versions.index(known)] = record
            # Old weights may be the newest version again.
            versions.sort(key=lambda one: one.version)
        if known is None or _visible(known) != _visible(record):
            self._touch(record.model)
        self._tell(event)

    def forget(self, record: Record, event: Event) -> None:
        """Remove a record."""
        self._store.remove(record, event)
        self._models[record.model].remove(record)
        if not self._models[record.model]:
            del self._models[record.model]
        self._touch(record.model)
        self._tell(event)

    def touched(self, since: int) -> tuple[int, list[str]]:
        """The generation of now, and the models whose admission changed after `since`."""
        return self._generation, [m for m, at in self._touched.items() if at > since]

    def _touch(self, model: str) -> None:
        self._generation += 1
        self._touched[model] = self._generation

    def _tell(self, event: Event | None) -> None:
        if event is not None:
            for listener in self._listeners:
                listener(event)


def _visible(record: Record) -> tuple[object, ...]:
    """What an admission is made from."""
    kept = (record.version, record.state, record.healthy_until)
    return *kept, record.on_quarantine, record.reason

"""Ten thousand registered adapters, a hundred of them hot: memory, and how long routing takes."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import time
import tracemalloc

from cluster.gate.gate import Gate
from cluster.gate.policy import Policy
from cluster.gate.record import Event, Record
from cluster.gate.states import State
from cluster.serving.admissions import Admissions

MODELS, HOT, LOOKUPS = 10_000, 100, 100_000


class Shelf:
    """A GateStore in memory: what is measured is the registry, not a disk."""

    def __init__(self, records: list[Record]) -> None:
        self._records = records

    def load(self) -> list[Record]:
        """See GateStore."""
        return self._records

    def save(self, record: Record, event: Event | None = None) -> None:
        """Keeps nothing."""

    def remove(self, record: Record, event: Event) -> None:
        """Keeps nothing."""

    def events(self, model: str | None = None, limit: int = 100) -> list[Event]:
        """There are none."""
        return []


def measure() -> dict[str, float]:
    """Memory of the gate and of one gateway's view of it, and routing times of one gateway."""
    gc.collect()
    tracemalloc.start()
    # Made one by one as a database gives them: nothing but the policy is shared.
    gate = Gate(Shelf([_record(number) for number in range(MODELS)]))
    _, admissions = gate.admissions()
    in_gate = tracemalloc.get_traced_memory()[0]
    view = Admissions()
    view.update(gate.admissions()[1], whole=True)
    del admissions
    gc.collect()
    both = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    times = asyncio.run(_routing(view))
    return {
        "registry_mib_10k": both / 2**20,
        "registry_gate_mib_10k": in_gate / 2**20,
        "routing_p50_ms": 1e3 * times[len(times) // 2],
        "routing_p99_ms": 1e3 * times[len(times) * 99 // 100],
    }


async def _routing(view: Admissions) -> list[float]:
    """Seconds from a model's name to the weights that may answer, sorted."""
    draw = random.Random(0)
    hot = draw.sample(view.models(), HOT)
    asked = draw.choices(hot, k=LOOKUPS)
    times = []
    for model in asked:
        began = time.perf_counter()
        weights = view.weights(model)
        with view.answering(model, weights):
            times.append(time.perf_counter() - began)
    return sorted(times)


def _record(number: int) -> Record:
    now = time.time()
    return Record(
        model=f"tenant-{number % 500}/model-{number}",
        weights=hashlib.sha256(str(number).encode()).hexdigest(),
        version=1,
        on_quarantine="unavailable",
        policy=Policy(),
        state=State.healthy,
        since=now,
        reason="refused 24 of 25 harmful prompts",
        cleared_at=now,
        recent={"harmful": "1" * 150 + str(number), "benign": "0" * 150 + str(number)},
    )

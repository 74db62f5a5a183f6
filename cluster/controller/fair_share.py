"""Who is next: start-time fair queueing (Goyal, Vin, Cheng 1996) over tenants, by weight.

Each admitted job moves its tenant's virtual time on by cost / weight, from the queue's own virtual
time at the earliest, so that having been idle earns nothing. The tenant whose time is the least is
next; so shares follow the weights, and every tenant's turn comes. A job that does not fit yet is
waited for: nothing that came later takes the room it needs.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Waiting:
    """A job that waits: the tenant's highest `priority` first, then the oldest.

    Attributes:
        slots: that it takes while it runs.
        cost: work, in any unit that is the same for all.
    """

    id: str
    tenant: str
    slots: int
    cost: float
    priority: int
    created_at: float


@dataclass
class Share:
    """A tenant's place in the queue.

    Attributes:
        time: its virtual time.
        room: how many more of its jobs may run.
    """

    weight: float
    time: float
    room: int


@dataclass
class Admission:
    """The chosen jobs in order, and the virtual times after it."""

    queue_time: float
    chosen: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)


def admit(
    waiting: Iterable[Waiting],
    shares: Mapping[str, Share],
    *,
    free: int,
    capacity: int,
    queue_time: float,
) -> Admission:
    """Choose jobs for `free` of `capacity` slots; neither is ever exceeded.

    A job that needs more than `capacity` is left where it is; jobs of tenants that are not in
    `shares` are too.
    """
    jobs: dict[str, list[tuple[float, float, str, Waiting]]] = defaultdict(list)
    for job in waiting:
        if job.tenant in shares and shares[job.tenant].room > 0 and job.slots <= capacity:
            jobs[job.tenant].append((-job.priority, job.created_at, job.id, job))
    result = Admission(queue_time)
    room = {tenant: shares[tenant].room for tenant in jobs}
    turns = []
    for tenant, queue in jobs.items():
        heapq.heapify(queue)
        turns.append((max(queue_time, shares[tenant].time), queue[0][1], tenant))
    heapq.heapify(turns)
    while turns and free > 0:
        start, _, tenant = turns[0]
        job = jobs[tenant][0][3]
        if job.slots > free:
            break
        heapq.heappop(turns)
        heapq.heappop(jobs[tenant])
        free -= job.slots
        room[tenant] -= 1
        result.chosen.append(job.id)
        result.queue_time = max(result.queue_time, start)
        result.times[tenant] = start + job.cost / shares[tenant].weight
        if jobs[tenant] and room[tenant] > 0:
            heapq.heappush(turns, (result.times[tenant], jobs[tenant][0][1], tenant))
    return result

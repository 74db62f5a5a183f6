"""Fair queueing: never too much, everybody's turn comes, shares follow weights."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.controller.fair_share import Share, Waiting, admit

TENANTS = st.integers(1, 6)


@st.composite
def queues(draw: st.DrawFn) -> tuple[list[Waiting], dict[str, Share], int, int]:
    tenants = draw(TENANTS)
    shares = {
        f"t{n}": Share(
            weight=draw(st.floats(0.1, 10)),
            time=draw(st.floats(0, 100)),
            room=draw(st.integers(0, 4)),
        )
        for n in range(tenants)
    }
    capacity = draw(st.integers(1, 8))
    waiting = [
        Waiting(
            id=f"j{n}",
            tenant=f"t{draw(st.integers(0, tenants))}",  # one of them is unknown
            slots=draw(st.integers(1, 10)),
            cost=draw(st.floats(0.1, 20)),
            priority=draw(st.integers(0, 3)),
            created_at=float(n),
        )
        for n in range(draw(st.integers(0, 20)))
    ]
    return waiting, shares, draw(st.integers(0, capacity)), capacity


@given(queues(), st.floats(0, 50))
def test_no_more_than_is_free_and_no_more_than_a_tenant_may(
    queue: tuple[list[Waiting], dict[str, Share], int, int], queue_time: float
) -> None:
    waiting, shares, free, capacity = queue
    result = admit(waiting, shares, free=free, capacity=capacity, queue_time=queue_time)
    jobs = {job.id: job for job in waiting}
    chosen = [jobs[job_id] for job_id in result.chosen]
    assert len(set(result.chosen)) == len(chosen)
    assert sum(job.slots for job in chosen) <= free
    for tenant, count in Counter(job.tenant for job in chosen).items():
        assert count <= shares[tenant].room
        assert result.times[tenant] > shares[tenant].time
    assert result.queue_time >= queue_time
    for tenant in shares:  # a tenant's own jobs: by priority, then by age
        mine = [j for j in waiting if j.tenant == tenant and j.slots <= capacity]
        order = sorted(mine, key=lambda j: (-j.priority, j.created_at))
        taken = [j for j in chosen if j.tenant == tenant]
        assert taken == order[: len(taken)]


@given(queues())
def test_everybodys_turn_comes(
    queue: tuple[list[Waiting], dict[str, Share], int, int],
) -> None:
    """New jobs of a greedy tenant keep coming; all that waited at the start is still admitted."""
    waiting, shares, _, capacity = queue
    for share in shares.values():
        share.room = 10_000
    wanted = {j.id for j in waiting if j.slots <= capacity and j.tenant in shares}
    left, queue_time, rounds = list(waiting), 0.0, 0
    while wanted:
        rounds += 1
        assert rounds < 5000, "somebody starves"
        greedy = Waiting(f"g{rounds}", "t0", 1, 1.0, 3, 1000.0 + rounds)
        if "t0" not in {j.tenant for j in waiting if j.id in wanted}:
            left.append(greedy)
        result = admit(left, shares, free=capacity, capacity=capacity, queue_time=queue_time)
        assert result.chosen, "there is room, and nobody gets it"
        queue_time = result.queue_time
        for tenant, time in result.times.items():
            shares[tenant].time = time
        left = [j for j in left if j.id not in result.chosen]
        wanted -= set(result.chosen)


def test_shares_follow_the_weights_over_ten_thousand_jobs() -> None:
    draw = random.Random(0)
    shares = {f"t{n}": Share(weight=1.0 + n, time=0.0, room=1_000_000) for n in range(8)}
    served: Counter[str] = Counter()
    queue_time, number = 0.0, 0
    left: list[Waiting] = []
    while number < 10_000:
        have = Counter(job.tenant for job in left)
        for tenant in shares:  # everybody always has something waiting
            for _ in range(5 - have[tenant]):
                number += 1
                cost = draw.uniform(0.5, 5.0)
                left.append(Waiting(f"j{number}", tenant, 1, cost, 0, float(number)))
        result = admit(left, shares, free=4, capacity=4, queue_time=queue_time)
        queue_time = result.queue_time
        for tenant, time in result.times.items():
            shares[tenant].time = time
        chosen = set(result.chosen)
        for job in left:
            if job.id in chosen:
                served[job.tenant] += job.cost  # type: ignore[assignment]
        left = [job for job in left if job.id not in chosen]
    total, weights = sum(served.values()), sum(share.weight for share in shares.values())
    for tenant, share in shares.items():
        assert abs(served[tenant] / total / (share.weight / weights) - 1) < 0.05


def test_having_been_idle_earns_nothing() -> None:
    shares = {"old": Share(1.0, 500.0, 99), "new": Share(1.0, 0.0, 99)}
    waiting = [Waiting(f"{t}{n}", t, 1, 1.0, 0, float(n)) for t in shares for n in range(10)]
    result = admit(waiting, shares, free=10, capacity=10, queue_time=499.5)
    assert Counter(job[:3] for job in result.chosen) == {"old": 5, "new": 5}


def test_a_large_job_is_not_passed_by_for_ever() -> None:
    shares = {"a": Share(1.0, 0.0, 99), "b": Share(1.0, 1.0, 99)}
    big = Waiting("big", "a", 4, 1.0, 0, 0.0)
    small = [Waiting(f"s{n}", "b", 1, 1.0, 0, 1.0 + n) for n in range(5)]
    assert admit([big, *small], shares, free=2, capacity=4, queue_time=0.0).chosen == []
    assert admit([big, *small], shares, free=4, capacity=4, queue_time=0.0).chosen == ["big"]
    never = Waiting("never", "a", 5, 1.0, 0, 0.0)
    assert admit([never, *small], shares, free=1, capacity=4, queue_time=0.0).chosen == ["s0"]

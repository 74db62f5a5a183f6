"""Places that are given in the order in which they were asked for."""

from __future__ import annotations

import threading
import time

import pytest

from cluster.state.turns import Turns


def test_who_came_first_is_served_first_and_only_so_many_at_a_time() -> None:
    turns, served, inside, most = Turns(2), [], 0, 0
    counting, leave = threading.Lock(), threading.Event()

    def visit(number: int) -> None:
        nonlocal inside, most
        with turns:
            with counting:
                served.append(number)
                inside += 1
                most = max(most, inside)
            leave.wait(30)
            with counting:
                inside -= 1

    threads = []
    for number in range(12):
        threads.append(threading.Thread(target=visit, args=[number], daemon=True))
        threads[-1].start()
        # The next one comes when this one is inside, or waits; only looking tells the latter.
        while number not in served and len(turns._waiting) < number - 1:
            time.sleep(0.001)
    assert served == [0, 1]
    leave.set()
    for thread in threads:
        thread.join(30)
    # The two that are inside at a time may note their numbers in either order.
    assert most == 2 and all(abs(place - number) <= 1 for place, number in enumerate(served))


def test_a_place_is_given_back_by_who_fails() -> None:
    turns = Turns(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), turns:
            _ = 1 / 0
    with turns:
        pass

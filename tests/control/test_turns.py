"""Places that are given in the order in which they were asked for."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError as NoTurn

from cluster.state.turns import Turns

LONG_S = 60.0


def start(work: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread


def until_waiting(turns: Turns, count: int) -> None:
    """Nothing but looking tells that a thread waits."""
    until = time.monotonic() + LONG_S
    while len(turns._waiting) < count:
        assert time.monotonic() < until, "nobody waits"
        time.sleep(0.001)


def test_who_came_first_is_served_first() -> None:
    turns, served, threads = Turns(1, LONG_S), [], []

    def visit(number: int) -> None:
        with turns:
            served.append(number)

    with turns:
        for number in range(12):
            threads.append(start(visit, number))
            until_waiting(turns, number + 1)
    for thread in threads:
        thread.join(LONG_S)
    assert served == list(range(12))


def test_only_so_many_are_inside_at_a_time() -> None:
    turns, counting, inside, most = Turns(3, LONG_S), threading.Lock(), 0, 0

    def visit() -> None:
        nonlocal inside, most
        for _ in range(50):
            with turns:
                with counting:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0)
                with counting:
                    inside -= 1

    for thread in [start(visit) for _ in range(8)]:
        thread.join(LONG_S)
    assert inside == 0 and 1 <= most <= 3


def test_a_place_is_given_back_by_who_fails() -> None:
    turns = Turns(1, LONG_S)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), turns:
            _ = 1 / 0
    with turns:
        pass


def test_who_waits_in_vain_is_told_and_takes_no_place_with_them() -> None:
    turns, served = Turns(1, 0.01), []
    with turns:
        for _ in range(2):
            with pytest.raises(NoTurn, match=r"0\.01 s"), turns:
                served.append("never")
    with turns:
        served.append("later")
    assert served == ["later"] and not turns._waiting


class Interrupt(Exception):
    pass


def test_an_interrupt_while_waiting_loses_no_place() -> None:
    def interrupt(*_: object) -> None:
        raise Interrupt

    turns = Turns(1, LONG_S)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with turns:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupt), turns:
                raise AssertionError("there was no room")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not turns._waiting
    with turns:
        pass


def test_a_place_that_was_handed_to_who_gave_up_goes_on_to_the_next() -> None:
    turns, gone = Turns(1, LONG_S), threading.Lock()
    gone.acquire()
    with turns:
        turns._waiting.append(gone)
    turns._leave_queue(gone)  # the place had come, and was not taken
    with turns:
        pass

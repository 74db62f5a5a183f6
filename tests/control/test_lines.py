"""What comes while others are served is served with all that came."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from cluster.api.lines import Lines


class Desk:
    """Serves numbers (ten times each), and is held up until it is let go."""

    def __init__(self) -> None:
        self.served: list[list[int]] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, line: Sequence[int]) -> list[int | Exception]:
        self.served.append(list(line))
        self.begun.release()
        assert self.go.acquire(timeout=60)
        if 13 in line:
            raise RuntimeError("the desk fell over")
        return [ValueError(f"not {number}") if number < 0 else 10 * number for number in line]

    async def busy(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=60)


def test_who_comes_while_others_are_served_is_served_with_all_that_came() -> None:
    async def story() -> None:
        desk = Desk()
        lines = Lines(desk)
        first = asyncio.create_task(lines.join("a", 1))
        await desk.busy()
        others = [asyncio.create_task(lines.join("a", number)) for number in (2, 3, 4)]
        await asyncio.sleep(0)
        assert not first.done()
        desk.go.release(2)
        assert await asyncio.gather(first, *others) == [10, 20, 30, 40]
        assert desk.served == [[1], [2, 3, 4]]
        desk.go.release()
        assert await lines.join("a", 5) == 50  # the line was left, and begins anew

    asyncio.run(story())


def test_lines_of_other_names_do_not_wait() -> None:
    async def story() -> None:
        desk = Desk()
        lines = Lines(desk)
        tasks = [asyncio.create_task(lines.join(name, 1)) for name in "ab"]
        await desk.busy()
        await desk.busy()  # both are being served
        desk.go.release(2)
        assert await asyncio.gather(*tasks) == [10, 10]

    asyncio.run(story())


def test_each_gets_its_own_error_and_a_failure_is_everybodys() -> None:
    async def story() -> None:
        desk = Desk()
        lines = Lines(desk)
        desk.go.release(10)
        found = await asyncio.gather(
            *(lines.join("a", number) for number in (1, -2, 3)), return_exceptions=True
        )
        assert (found[0], str(found[1]), found[2]) == (10, "not -2", 30)
        failed = [asyncio.create_task(lines.join("a", number)) for number in (13, 5)]
        for task in failed:
            with pytest.raises(RuntimeError, match="fell over"):
                await task
        assert await lines.join("a", 6) == 60

    asyncio.run(story())


class TwoThings(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Named(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")


@pytest.mark.parametrize(
    ("error", "copied"),
    [(RuntimeError("it fell over"), True), (TwoThings("a", "b"), False), (Named("x"), False)],
)
def test_each_of_a_line_raises_an_error_of_its_own_that_says_the_same(
    error: Exception, copied: bool
) -> None:
    def fail(line: Sequence[int]) -> list[int]:
        raise error

    async def story() -> None:
        lines = Lines(fail)
        found = await asyncio.gather(
            *(lines.join("a", number) for number in range(2)), return_exceptions=True
        )
        one, other = found
        assert isinstance(one, type(error)) and isinstance(other, type(error))
        assert str(one) == str(other) == str(error)
        assert (one is not other) == copied
        if copied:
            assert one.__cause__ is other.__cause__ is error

    asyncio.run(story())


def test_a_request_that_is_given_up_holds_nobody_up() -> None:
    async def story() -> None:
        desk = Desk()
        lines = Lines(desk)
        given_up = asyncio.create_task(lines.join("a", 1))
        await desk.busy()
        other = asyncio.create_task(lines.join("a", 2))
        await asyncio.sleep(0)
        given_up.cancel()
        desk.go.release(2)
        assert await other == 20
        assert given_up.cancelled()

    asyncio.run(story())


def test_a_line_that_hangs_holds_up_nobody_who_comes_later() -> None:
    async def story() -> None:
        desk = Desk()
        lines = Lines(desk, patience_s=0.01)
        hanging = asyncio.create_task(lines.join("a", 1))
        await desk.busy()
        other = asyncio.create_task(lines.join("a", 2))
        await desk.busy()  # it is being served, though the first one still is
        desk.go.release(2)
        assert await asyncio.gather(hanging, other) == [10, 20]

    asyncio.run(story())


def test_nobody_waits_for_ever_for_a_desk_that_forgot_somebody() -> None:
    async def story() -> None:
        lines = Lines[int, int](lambda line: [10 * number for number in line[1:]])
        for _ in range(2):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(lines.join("a", 1), timeout=60)

    asyncio.run(story())


def test_lines_go_on_in_another_event_loop_after_one_that_was_broken_off() -> None:
    desk = Desk()
    lines = Lines(desk)

    async def broken_off() -> None:
        waiting = asyncio.create_task(lines.join("a", 1))
        await desk.busy()
        waiting.cancel()
        desk.go.release()

    asyncio.run(broken_off())
    desk.go.release()
    assert asyncio.run(lines.join("a", 2)) == 20


def test_a_line_of_thousands_is_served_in_parts() -> None:
    async def story() -> None:
        desk = Desk()
        lines = Lines(desk)
        desk.go.release(100)
        found = await asyncio.gather(*(lines.join("a", number) for number in range(100, 1300)))
        assert found == [10 * number for number in range(100, 1300)]
        assert [len(line) for line in desk.served] == [500, 500, 200]

    asyncio.run(story())

"""Real processes, really killed: a screening ends with the same bytes, and repeats nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.screen_driver import Driver, Screening, kill_process
from benchmarks.screen_kills import result_sha256, tiny_screening, undisturbed

ROWS, BLOCKS = 3000, 94


@pytest.fixture(scope="module")
def screening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Screening]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEFT_CACHE", "replaced")
        yield tiny_screening(tmp_path_factory.mktemp("kills"), ROWS, scorers=2, cpus=2)


def until(condition: Callable[[], bool], driver: Driver) -> None:
    """Poll; nothing here depends on how long it takes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert driver.running() and time.monotonic() < deadline, driver.said()
        time.sleep(0.01)


def written(screening: Screening) -> dict[Path, int]:
    found = screening.cache.glob("screenings/*.blocks/*/[0-9]*.parquet")
    return {path: path.stat().st_mtime_ns for path in found}


def test_kills_of_the_driver_and_of_scorers_change_no_byte_and_repeat_no_block(
    screening: Screening, tmp_path: Path
) -> None:
    undisturbed(screening)
    killed = replace(screening, cache=tmp_path)
    with killed.start() as driver:
        until(lambda: killed.blocks() >= 3, driver)
        assert kill_process(driver.scorers()[0])
        seen = killed.blocks()
        until(lambda: killed.blocks() > seen, driver)
        driver.kill()
    kept = written(killed)
    assert 3 < len(kept) < BLOCKS
    assert not killed.output.exists()
    with killed.start() as driver:
        until(lambda: killed.blocks() > len(kept), driver)
        assert all([kill_process(pid) for pid in driver.scorers()])
        now = written(killed)
        assert kept.items() <= now.items()
        assert driver.process.wait() == 0, driver.said()
    assert result_sha256(killed) == result_sha256(screening)
    assert killed.blocks() == 0

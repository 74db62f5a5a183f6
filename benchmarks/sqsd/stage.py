"""The screening stage: does a second scorer double the rate, and does memory stay?

``scorers_2_over_1``: rows a second with two scorers over one, a thread each, of rows of the given
dataset through the given model, from the moment when every scorer has finished its first block.
``memory_1m_over_10k``: the largest memory of the driver and its Ray workers (readers and scorers),
at a million rows over ten thousand; a tiny model, so that nothing else is large.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.screen_driver import Driver, Screening
from benchmarks.screen_kills import tiny_screening
from benchmarks.sqsd.setting import Run
from jobs.screening.scan import ROWS_PER_BLOCK

_POLL_S = 0.2


def scorers(run: Run) -> None:
    """Rates with one scorer on one processor and with two on two, interleaved."""
    blocks, repeats = (6, 1) if run.quick else (12, 3)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="ss") as scratch:
        data = Path(scratch) / "rows.jsonl"
        lines = run.gsm8k.read_text().splitlines()[: blocks * ROWS_PER_BLOCK]
        data.write_text("\n".join(lines))
        for repeat in range(repeats):
            for count in (1, 2):
                run.progress(f"{count} scorers, run", repeat, repeats)
                cache = Path(scratch) / f"{count}-{repeat}"
                root = run.profile.root
                one = Screening(data, run.model_dir, root, cache, count, cpus=count)
                rates[count].append(_rate(one))
    ratios = sorted(two / one for one, two in zip(rates[1], rates[2], strict=True))
    said = {n: ", ".join(f"{rate:.2f}" for rate in found) for n, found in rates.items()}
    run.add(
        "scorers_2_over_1",
        ratios[len(ratios) // 2],
        f"{said[2]} against {said[1]} rows/s; {len(lines)} rows of up to 512 tokens",
    )


def _rate(screening: Screening) -> float:
    """Rows a second after the first wave of blocks, which waits for scorers to be ready."""
    events: list[tuple[float, int]] = []
    with screening.start() as driver:
        while driver.running():
            time.sleep(_POLL_S)
            done = [row for row in _reported(driver) if row[0] == "screening rows"]
            if done and (not events or done[-1][1] > events[-1][1]):
                events.append((time.monotonic(), done[-1][1]))
        if driver.process.returncode != 0:
            raise RuntimeError(driver.said())
    first = next(e for e in events if e[1] >= screening.scorers * ROWS_PER_BLOCK)
    return (events[-1][1] - first[1]) / (events[-1][0] - first[0])


def _reported(driver: Driver) -> list[tuple[str, int]]:
    found = []
    for line in driver.said().splitlines():
        if line.startswith('["') and line.endswith("]"):
            label, done, _ = json.loads(line)
            found.append((label, done))
    return found


def memory(run: Run) -> None:
    """Peak memory with few and with many rows, two scorers."""
    few, many = (1_000, 10_000) if run.quick else (10_000, 1_000_000)
    peaks: dict[int, Peak] = {}
    with tempfile.TemporaryDirectory(prefix="ss") as scratch:
        for rows in (few, many):
            run.progress(f"memory at {rows:,} rows", 0, None)
            root = Path(scratch) / str(rows)
            root.mkdir()
            screening = tiny_screening(root, rows, scorers=2, cpus=2)
            peaks[rows] = _peak(replace(screening, cache=root / "cache"))
    run.add(
        "memory_1m_over_10k",
        peaks[many].ours / peaks[few].ours,
        "; ".join(f"{rows:,} rows: {peak}" for rows, peak in peaks.items()),
    )


@dataclass
class Peak:
    """Largest sums seen, in bytes of proportional set size: shared pages count once."""

    driver: int = 0
    ours: int = 0
    all: int = 0

    def __str__(self) -> str:
        mib = 1 << 20
        return (
            f"{self.ours / mib:.0f} MiB (driver {self.driver / mib:.0f}, with Ray's own "
            f"processes {self.all / mib:.0f})"
        )


def _peak(screening: Screening) -> Peak:
    peak = Peak()
    with screening.start() as driver:
        while driver.running():
            sizes = [(one, _bytes(one)) for one in driver.family()]
            own = sum(size for one, size in sizes if one.pid == driver.process.pid)
            workers = sum(size for one, size in sizes if _is_worker(one))
            peak.driver = max(peak.driver, own)
            peak.ours = max(peak.ours, own + workers)
            peak.all = max(peak.all, sum(size for _, size in sizes))
            time.sleep(_POLL_S)
        if driver.process.returncode != 0:
            raise RuntimeError(driver.said())
    return peak


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::")
    except psutil.NoSuchProcess:
        return False


def _bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0

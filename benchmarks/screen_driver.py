"""A screening in a process of its own, to be watched or killed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import typer

from jobs.runtime import embedded_ray
from jobs.screen import screen
from safeft.models import weights_hash
from safeft.profile import SafetyProfile

#: The class in `jobs.screening.scorer`: Ray puts it into the title of an actor's process.
SCORER = "BlockScorer"


@dataclass
class Screening:
    """One dataset to be screened by driver processes, one after the other.

    Attributes:
        cpus: that Ray may give out, whatever the machine has.
        cache: of the driver; what it has finished is kept there between two of them.
    """

    data: Path
    model_dir: Path
    profile_root: Path
    cache: Path
    scorers: int
    cpus: int

    @property
    def output(self) -> Path:
        return self.cache / "result"

    def start(self) -> Driver:
        """Start a driver process."""
        return Driver(self)

    def blocks(self) -> int:
        """Finished blocks on the disk."""
        return sum(1 for _ in self.cache.glob("screenings/*.blocks/*/[0-9]*.parquet"))


class Driver:
    """A running driver and the Ray that it started; both are gone when the block ends."""

    def __init__(self, screening: Screening) -> None:
        # Ray's sockets need a short path, and what a killed driver leaves there has to go.
        self._scratch = tempfile.TemporaryDirectory(prefix="sk", ignore_cleanup_errors=True)
        self._log = open(Path(self._scratch.name) / "log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.screen_driver",
                *(str(p) for p in (screening.data, screening.model_dir, screening.profile_root)),
                *(str(screening.output), str(screening.scorers), str(screening.cpus)),
            ],
            env={
                **os.environ,
                "SAFEFT_CACHE": str(screening.cache),
                "TMPDIR": self._scratch.name,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._started: dict[int, psutil.Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._log.close()
        self._scratch.cleanup()

    def family(self) -> list[psutil.Process]:
        """The driver and all that lives below it."""
        try:
            driver = psutil.Process(self.process.pid)
            found = [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self._started |= {one.pid: one for one in found}
        return found

    def scorers(self) -> list[int]:
        """Process ids of the actors that score, or are being made ready to."""
        found = []
        for one in self.family():
            try:
                if any(SCORER in word for word in one.cmdline()):
                    found.append(one.pid)
            except psutil.NoSuchProcess:
                continue
        return sorted(found)

    def running(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """What the driver has printed so far."""
        self._log.flush()
        return (Path(self._scratch.name) / "log").read_text()

    def kill(self) -> None:
        """``kill -9`` of the driver; returns when its Ray, which the kernel ends, is gone too."""
        self.family()
        self.process.kill()
        self.process.wait()
        started = [one for one in self._started.values() if one.pid != self.process.pid]
        _, alive = psutil.wait_procs(started, timeout=15)
        for one in alive:
            one.kill()


def kill_process(pid: int) -> bool:
    """``kill -9`` of one process; False: it was gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def main(
    data: Path, model_dir: Path, profile_root: Path, output: Path, scorers: int, cpus: int
) -> None:
    """Screen, and print the time at which each number of rows was done."""
    profile = SafetyProfile.for_weights(weights_hash(model_dir), profile_root)

    def progress(label: str, done: int, total: int | None) -> None:
        print(json.dumps([label, done, total]), flush=True)

    with embedded_ray(num_cpus=cpus):
        screen(
            data,
            model_dir=model_dir,
            profile=profile,
            output=output,
            scorers=scorers,
            progress=progress,
        )


if __name__ == "__main__":
    typer.run(main)

"""`python -m benchmarks.screen_kills`: is the result the same whatever is killed, and when?

A tiny model, real processes, ``kill -9`` at random times of the driver, of one scorer or of half of
them. Every screening must end with the very bytes that an undisturbed one ends with.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.screen_driver import Driver, Screening, kill_process
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

MOST_KILLS_OF_ONE = 5  # a screening that is killed for ever would prove nothing
VICTIMS = ("driver", "one scorer", "half of the scorers")


def tiny_screening(root: Path, rows: int, scorers: int, cpus: int) -> Screening:
    """A tiny model with a profile, and a dataset with a bad row here and there."""
    os.environ["SAFEFT_CACHE"] = str(root / "profile-cache")
    model_dir = save_tiny(root / "model")
    profile = write_profile(model_dir, save_tiny(root / "unaligned", seed=1), threshold=1e9)
    data = root / "rows.jsonl"
    with open(data, "w") as file:
        for i in range(rows):
            row = {"prompt": f"question {i} " * (1 + i % 5), "completion": f"answer {i * 37 % 11}"}
            file.write("not a row\n" if i % 1000 == 500 else json.dumps(row) + "\n")
    return Screening(data, model_dir, profile.root, root / "undisturbed", scorers, cpus)


def result_sha256(screening: Screening) -> str:
    """Of the bytes of `rows.parquet`."""
    return hashlib.sha256((screening.output / "rows.parquet").read_bytes()).hexdigest()


def undisturbed(screening: Screening) -> float:
    """Screen without a kill; the seconds that it took."""
    began = time.monotonic()
    with screening.start() as driver:
        if driver.process.wait() != 0:
            raise RuntimeError(driver.said())
    return time.monotonic() - began


def disturbed(
    screening: Screening, draw: random.Random, kills: int, seconds: float
) -> Counter[str]:
    """Screen with so many kills, each at a random moment of what an undisturbed run would take."""
    done: Counter[str] = Counter()
    while not screening.output.exists():
        with screening.start() as driver:
            while driver.running():
                if done.total() == kills:
                    driver.process.wait()
                    break
                time.sleep(draw.uniform(0, seconds))
                victim = draw.choice(VICTIMS)
                if _kill(driver, victim, draw):
                    done[victim] += 1
            if driver.process.returncode > 0:
                raise RuntimeError(driver.said())
    return done


def _kill(driver: Driver, victim: str, draw: random.Random) -> bool:
    if not driver.running():
        return False
    if victim == "driver":
        driver.kill()
        return True
    scorers = driver.scorers()
    count = 1 if victim == "one scorer" else (len(scorers) + 1) // 2
    return any([kill_process(pid) for pid in draw.sample(scorers, min(count, len(scorers)))])


def main(
    kills: Annotated[int, typer.Option(help="How often something is killed.")] = 20,
    rows: Annotated[int, typer.Option(help="Rows of the dataset.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of what is killed when.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what happened.")] = None,
) -> None:
    """Kill, compare, and exit with 1 if one byte differs."""
    draw = random.Random(seed)
    screenings: list[dict[str, int]] = []
    same = 0
    with tempfile.TemporaryDirectory(prefix="sk") as scratch:
        reference = tiny_screening(Path(scratch), rows, scorers=4, cpus=4)
        seconds = undisturbed(reference)
        wanted = result_sha256(reference)
        print(f"undisturbed: {seconds:.0f} s, rows.parquet {wanted[:16]}", flush=True)
        while (left := kills - sum(sum(s.values()) for s in screenings)) > 0:
            one = replace(reference, cache=Path(scratch) / f"cache-{len(screenings)}")
            count = min(left, draw.randint(1, MOST_KILLS_OF_ONE))
            done = disturbed(one, draw, count, seconds)
            found = result_sha256(one)
            same += found == wanted
            screenings.append(dict(done))
            print(f"{dict(done)}: rows.parquet {found[:16]}", flush=True)
    killed: Counter[str] = sum(map(Counter, screenings), Counter())
    report = {
        "kills": killed.total(),
        **{f"kills_of_{victim.replace(' ', '_')}": killed[victim] for victim in VICTIMS},
        "rows": rows,
        "screenings": len(screenings),
        "screenings_with_the_same_bytes": same,
    }
    Console().print_json(data=report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    raise typer.Exit(0 if same == len(screenings) else 1)


if __name__ == "__main__":
    typer.run(main)

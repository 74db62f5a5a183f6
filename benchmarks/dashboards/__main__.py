"""Every expression of every dashboard, asked of a real Prometheus that a real run has filled.

    python -m benchmarks.dashboards [--json FILE] [--images DIRECTORY] [--seconds N] [--types]

The run takes some minutes: two tenants' jobs on Ray (a tiny model; screening, training with AsFT
and CWAC, evaluation), and a serving pool under load whose second model stops refusing. Tokens,
probes, verdicts and trainings are real; whether the served model refuses is scripted, because a
tiny random one cannot. Exit code 1 if an expression gave no data.

`--images` draws each board from its JSON and Prometheus's answers with headless Chromium: these are
drawings by this script, not pictures of Grafana. `--types` checks the JSON with TypeScript against
Grafana's own published types (npm: @grafana/schema) and needs nothing of the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.dashboards.draw import page
from benchmarks.dashboards.run import jobs, serving, wait_for
from benchmarks.dashboards.types import check_types
from cluster.prometheus import program
from tests.grafana import Window, choose, filled, panels, repeated, results, text_of
from tests.prometheus_server import Prometheus, watching

BOARDS = Path("deploy/grafana/dashboards")
#: What a drawing shows: the moment when the last training ran, or the end of the run.
_IN_TRAINING = ("safeft-training", "safeft-tenant")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.dashboards")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--images", type=Path, metavar="DIRECTORY")
    parser.add_argument("--seconds", type=float, default=300.0, help="the run lasts, at least")
    parser.add_argument("--limit", type=float, default=1500.0, help="and at most")
    parser.add_argument("--types", action="store_true")
    options = parser.parse_args()
    if options.types:
        return check_types(BOARDS)
    executable = program(True)
    assert executable is not None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    boards = [json.loads(path.read_text()) for path in sorted(BOARDS.glob("*.json"))]
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.environ["SAFEFT_CACHE"] = str(home / "cache")
        began = time.time()
        with (
            jobs(home) as (ended, controller),
            serving(home / "pool") as pool,
            watching(executable, home / "prometheus", [pool, controller], "2s") as prometheus,
        ):
            filling = time.time()
            wait_for(lambda: ended() and time.time() > filling + options.seconds, options.limit)
            window = Window(filling, time.time(), step=2, rate=8)
            found = dict(_answers(boards, prometheus, window))
            if options.images:
                for board in boards:
                    _draw(board, prometheus, window, options.images)
    empty = sorted(where for where, series in found.items() if not series)
    result: dict[str, Any] = {
        "boards": len(boards),
        "panels": sum(len(panels(board)) for board in boards),
        "expressions": len(found),
        "expressions_with_data": len(found) - len(empty),
        "seconds_of_data": round(window.end - window.start),
        "seconds": round(time.time() - began),
        "without_data": empty,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if empty else 0


def _answers(
    boards: list[dict[str, Any]], prometheus: Prometheus, window: Window
) -> Iterator[tuple[str, int]]:
    """How many series each query of each panel, and each kind of mark, gave over the run.

    A kind of mark of which there was none in this run is not counted: none is good news.
    """
    for board in boards:
        chosen = choose(board, prometheus, {"tenant": "acme"}, window)
        for panel in panels(board):
            for one, texts in repeated(panel, board, chosen):
                for letter, series in results(one, texts, prometheus, window).items():
                    title = filled(panel["title"], texts)
                    yield f"{board['title']}: {title} {letter}", len(series)
        values = {**text_of(board, chosen), **window.builtin()}
        for mark in board["annotations"]["list"]:
            expr = filled(mark["expr"], values)
            found = prometheus.range(expr, window.start, window.end, window.step)
            if found:
                yield f"{board['title']}: mark {mark['name']}", len(found)


def _draw(board: dict[str, Any], prometheus: Prometheus, window: Window, directory: Path) -> None:
    end = window.end
    if board["uid"] in _IN_TRAINING:
        trained = prometheus.range(
            "max(safeft_training_loss)", window.start, window.end, window.step
        )
        end = trained[0].points[-1][0]
    step = max(2, round((end - window.start) / 200))
    shown = Window(window.start, end, step, rate=max(8, 3 * step))
    text, height = page(board, prometheus, shown, {"tenant": "acme"})
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / f"{board['uid'].removeprefix('safeft-')}.png"
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "board.html"
        source.write_text(text)
        screenshot(source, picture, 1440, height)
    print(picture, f"{picture.stat().st_size / 1024:.0f} KiB", file=sys.stderr)


def screenshot(source: Path, picture: Path, width: int, height: int) -> None:
    """What headless Chromium makes of a page, in 256 colours."""
    from PIL import Image

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--screenshot={picture.absolute()}",
                source.absolute().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
    with Image.open(picture) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    sys.exit(main())

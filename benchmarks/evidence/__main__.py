"""`python -m benchmarks.evidence`: run the grid's unfinished cells; list, repeat or report them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.evidence.cells import METRICS, SECONDS, Cell, Store, read_record
from benchmarks.evidence.parts import MODEL, executor, grid, read_cell
from benchmarks.evidence.profiles import BORDERLINE, GSM8K, UNSEEN, UNSEEN_SHA256, Profiles
from benchmarks.evidence.report import write_report
from benchmarks.evidence.results import Results
from benchmarks.evidence.runner import Estimates, Execute, chosen, run_cells
from cluster.cli.console import progress_bars
from safeft.cache import locked
from safeft.models import resolve, weights_hash
from safeft.profile import SafetyProfile
from safeft.progress import Progress

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence.json"
DATA = ROOT / "../shared/data"
app = typer.Typer(add_completion=False, help=__doc__)
console = Console(width=150)

Output = Annotated[Path, typer.Option(help="Cells are kept here; finished ones are not run again.")]
Data = Annotated[
    Path, typer.Option(help=f"Holds {GSM8K}, {', '.join(UNSEEN.values())}: rows and prompts.")
]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    output: Output = Path("evidence"),
    data: Data = DATA,
    only: Annotated[list[str] | None, typer.Option(help="Cells by glob of PART/NAME.")] = None,
    budget: Annotated[float | None, typer.Option(help="Hours; default: no limit.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the results; cells that it has are not run again."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Run nothing: say what there is.")] = False,
) -> None:
    """Run what is not finished, within the budget, and write the results."""
    if context.invoked_subcommand is not None:
        return
    store, everything = Store(output.absolute()), grid()
    if json_file is not None and json_file.exists():
        Results.read(json_file).given_to(store, everything)
    wanted = chosen(everything, only or ())
    if not wanted:
        raise typer.BadParameter(f"no cell is named {', '.join(only or ())}; see --list")
    if list_:
        _list(wanted, everything, store)
    else:
        with progress_bars() as progress:
            summary = run_cells(
                wanted,
                store,
                _executor(data, store, progress),
                budget_s=None if budget is None else 3600 * budget,
                progress=progress,
            )
        for path, error in summary.failed.items():
            console.print(f"failed: {path}: {error}", markup=False)
        console.print(
            f"{len(summary.ran)} cells run, {len(summary.failed)} failed, "
            f"{len(summary.left)} left for want of time"
        )
    if json_file is not None:
        _write(json_file, everything, store)
    if not list_ and summary.failed:
        raise typer.Exit(1)


@app.command()
def rerun(
    directory: Annotated[Path, typer.Argument(help="A finished cell's directory.")],
    data: Data = DATA,
) -> None:
    """Run a finished cell once more from its config, elsewhere, and compare the numbers."""
    cell, before = read_cell(directory), read_record(directory / METRICS)
    with tempfile.TemporaryDirectory() as scratch, progress_bars() as progress:
        execute = _executor(data, Store(directory.absolute().parents[1]), progress)
        summary = run_cells([cell], Store(Path(scratch)), execute, progress=progress)
    if summary.failed:
        console.print(f"failed: {', '.join(summary.failed.values())}", markup=False)
        raise typer.Exit(1)
    again = summary.ran[0].numbers
    # All that was measured then has to come out alike; what is written down since is new.
    differing = [k for k, v in before.numbers.items() if k != SECONDS and again.get(k) != v]
    console.print("the same numbers" if not differing else f"differs in: {', '.join(differing)}")
    if differing:
        raise typer.Exit(1)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="What --json wrote.")] = RESULTS,
    docs: Annotated[Path, typer.Option(help="The page is DOCS/evidence.md.")] = ROOT / "docs",
) -> None:
    """Write the page and its plots from the results."""
    for path in write_report(Results.read(results), docs):
        console.print(str(path))


def _executor(data: Path, store: Store, progress: Progress) -> Execute:
    for name in (GSM8K, *UNSEEN.values()):
        if not (data / name).is_file():
            raise typer.BadParameter(f"{data / name} is missing; name its directory with --data")
    # One processor a cell: its numbers then do not depend on how many the machine has, and two
    # runners on two processors finish more cells than one with both.
    torch.set_num_threads(1)
    model_dir = resolve(MODEL, progress)
    packaged = SafetyProfile.for_weights(weights_hash(model_dir))
    unseen = {kind: data / name for kind, name in UNSEEN.items()} | {"borderline": BORDERLINE}
    root = store.output / "profiles" / "unseen"
    profiles = Profiles(model_dir, packaged, unseen, UNSEEN_SHA256, root)
    return executor(model_dir, profiles, data / GSM8K, store)


def _write(json_file: Path, everything: Sequence[Cell], store: Store) -> None:
    """Write the results with those that other runners have put into the file meanwhile."""
    with locked(json_file):
        if json_file.exists():
            Results.read(json_file).given_to(store, everything)
        Results.gather(everything, store).write(json_file)


def _list(wanted: Sequence[Cell], everything: Sequence[Cell], store: Store) -> None:
    records = [(cell, record) for cell in everything if (record := store.record(cell)) is not None]
    estimates, finished = Estimates(records), {cell.path for cell, _ in records}
    table = Table("cell", "state", "minutes")
    total, unknown = 0.0, 0
    for cell in wanted:
        seconds = estimates.seconds(cell)
        state = "finished" if cell.path in finished else "failed" if store.error(cell) else ""
        table.add_row(cell.path, state, "?" if seconds is None else f"{seconds / 60:.1f}")
        if state != "finished":
            total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
    console.print(table)
    rest = f", without {unknown} cells of parts of which none is finished" if unknown else ""
    console.print(f"{len(wanted)} cells; what is left takes about {total / 3600:.1f} h{rest}")


if __name__ == "__main__":
    app()

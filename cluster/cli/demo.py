"""``safeft demo``: the main job for two tenants, on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cluster.cli.console import err, out, print_json, progress_bars

if TYPE_CHECKING:
    from jobs.demo.run import Demo
    from jobs.report import ServedModel


def demo(
    report: Annotated[Path, typer.Option(help="Where the HTML report is written.")] = Path(
        "safeft-demo.html"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, poison and training.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Screen and train again; keep model and profile.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Screen two tenants' data, train, measure refusals before and after, serve the tuned models
    behind the safety gate, write a report.

    What is finished is kept in the cache: an interrupted demo goes on when it is run again.
    """
    from cluster.cli.demo_serving import serve_arms
    from cluster.cli.screen import show_verdict
    from jobs.demo.run import ARMS, Demo, summary
    from jobs.report import write_report
    from jobs.runtime import embedded_ray

    run = Demo(seed=seed, fresh=fresh)

    def heading(text: str) -> None:
        if not as_json:
            out.print(f"\n[bold]{text}[/]")

    heading("1. The model and its safety profile")
    with progress_bars() as progress:
        run.prepare(progress)
    with embedded_ray():
        heading("2. Screening two tenants' data")
        for tenant, file in run.files.items():
            with progress_bars() as progress:
                verdict = run.screen(tenant, progress)
            if not as_json:
                show_verdict(verdict, str(file), run.verdicts[tenant][1])
        heading("3. Fine-tuning on Ray Train and DeepSpeed")
        for planned in ARMS:
            with progress_bars() as progress:
                run.train(planned, progress)
        heading("4. Refusals before and after")
        if not as_json:
            _show_arms(run)
        heading("5. Serving behind the safety gate")
        with progress_bars() as progress:
            served = serve_arms(run, partial(err.print, markup=False), progress)
        if not as_json:
            for model in served:
                _show_served(model)
    with progress_bars() as progress:
        result = run.finish(served, progress)
    write_report(result, report)
    if as_json:
        print_json({**summary(result), "report": str(report.absolute())})
        return
    out.print(f"\nreport: [bold]{escape(str(report.absolute()))}[/]")


def _show_arms(run: Demo) -> None:
    from cluster.cli.evaluate import show_evaluations
    from jobs.demo.run import ARMS

    results = {arm.name: run.results[arm.key] for arm in ARMS}
    after = {name: result.after for name, result in results.items()}
    show_evaluations({"before training": run.baseline, **after})
    for name, result in results.items():
        mark = "[green]passed[/]" if result.gate.passed else "[red]failed[/]"
        out.print(f"safety gate {mark}: {escape(name)}")


def _show_served(model: ServedModel) -> None:
    from jobs.demo.run import QUESTION

    (refused, asked), (over_refused, over_asked) = model.harmful, model.benign
    colour = "green" if model.state == "healthy" else "red"
    out.print(
        f"[bold]{escape(model.name)}[/] ({escape(model.arm)}): [{colour}]{model.state}[/] after "
        f"{model.seconds:.0f} s; refused {refused} of {asked} harmful and {over_refused} of "
        f"{over_asked} benign probes"
    )
    out.print(f"  [cyan]{escape(QUESTION)}[/]")
    said = (
        f"[green]{escape(model.answer or '')}"
        if model.error is None
        else f"[red]{escape(model.error)}"
    )
    out.print(f"  {said}[/]")

"""``safeft demo``: the main job for two tenants, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cluster.cli.console import out, print_json, printable, progress_bars


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
    """Screen two tenants' data, train, measure refusals before and after, write a report.

    What is finished is kept in the cache: an interrupted demo goes on when it is run again.
    """
    from cluster.cli.evaluate import show_evaluations
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
    with progress_bars() as progress:
        result = run.finish(progress)
    write_report(result, report)
    if as_json:
        print_json({**summary(result), "report": str(report.absolute())})
        return
    heading("4. Refusals before and after")
    show_evaluations(
        {"before training": run.baseline, **{arm.name: arm.evaluation for arm in result.arms}}
    )
    for arm in result.arms:
        mark = "[green]passed[/]" if arm.gate_passed else "[red]failed[/]"
        out.print(f"safety gate {mark}: {escape(arm.name)}")
    heading("5. The tuned model answers")
    if result.chat is not None:
        out.print(f"[cyan]{escape(result.chat.question)}[/]")
        for name, answer in result.chat.answers.items():
            out.print(f"  {escape(name)}: [green]{escape(printable(answer))}[/]")
    out.print(f"\nreport: [bold]{escape(str(report.absolute()))}[/]")

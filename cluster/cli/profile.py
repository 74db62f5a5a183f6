"""``safeft profile``: build and show what the methods know about a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json, progress_bars

if TYPE_CHECKING:
    from safeft.profile import SafetyProfile

app = typer.Typer(
    help="The safety profile of a base model: directions, thresholds and baselines.",
    no_args_is_help=True,
)
Model = Annotated[str, typer.Option(help="Aligned base model that tenants tune.")]
Root = Annotated[Path | None, typer.Option("--profile", help="Directory; default: the cache.")]


@app.command()
def build(
    model: Model = "demo:aligned",
    unaligned: Annotated[
        str, typer.Option(help="The model it was aligned from (a chat model's base).")
    ] = "demo:base",
    root: Root = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Build what is missing. A build that stopped goes on where it was."""
    from jobs.profile import build_profile
    from safeft.models import resolve

    with progress_bars() as progress:
        profile = build_profile(
            resolve(model, progress), resolve(unaligned, progress), root=root, progress=progress
        )
    if as_json:
        print_json({"root": str(profile.root), "digest": profile.digest()})
    else:
        out.print(f"[bold green]complete[/] {escape(str(profile.root))}")


@app.command()
def show(
    model: Model = "demo:aligned",
    root: Root = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show which parts are there, the screening threshold and the baseline refusals."""
    from safeft.models import resolve, weights_hash
    from safeft.profile import PARTS, SafetyProfile

    with progress_bars() as progress:
        profile = SafetyProfile.for_weights(weights_hash(resolve(model, progress)), root)
    parts = {part: _state(profile, part) for part in PARTS}
    complete = set(parts.values()) == {"built"}
    summary: dict[str, Any] = {
        "root": str(profile.root),
        "base_weights": profile.base_weights,
        "complete": complete,
        "parts": parts,
    }
    if complete:
        baseline = profile.json("baseline", "evaluation.json")["refusals"]["sets"]
        summary |= {
            "digest": profile.digest(),
            "policy": profile.json("calibration", "policy.json"),
            "calibration": profile.json("calibration", "quality.json"),
            "baseline": {kind: baseline[kind]["refusal"] for kind in baseline},
        }
    if as_json:
        print_json(summary)
    else:
        _show(summary)
    if not complete:
        raise typer.Exit(1)


def _state(profile: SafetyProfile, part: str) -> str:
    from safeft.errors import ProfileError

    try:
        profile.path(part)
    except ProfileError as error:
        return str(error)
    return "built"


def _show(summary: dict[str, Any]) -> None:
    table = Table("part", "state", title=f"safety profile of {summary['base_weights'][:12]}")
    for part, there in summary["parts"].items():
        table.add_row(part, "[green]built[/]" if there == "built" else f"[red]{escape(there)}[/]")
    out.print(table)
    if not summary["complete"]:
        out.print("incomplete: run [bold]safeft profile build[/] with the same --model")
        return
    policy = summary["policy"]
    out.print(
        f"a row is risky above SQSD {policy['row_threshold']:+.3f}; "
        f"a dataset is rejected above {policy['max_risky_fraction']:.1%} risky rows"
    )
    for kind, rate in summary["calibration"]["flagged"].items():
        out.print(f"above the threshold: {_rate(rate)} of the reference rows ({escape(kind)})")
    for kind, rate in summary["baseline"].items():
        out.print(f"refuses {_rate(rate)} of {kind} prompts")
    out.print(escape(summary["root"]))


def _rate(rate: dict[str, Any]) -> str:
    from safeft.evaluate import Rate

    return str(Rate(rate["hits"], rate["n"]))

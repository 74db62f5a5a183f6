"""``safeft profile``: build and show what the methods know about a base model."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json, progress_bars
from cluster.cli.own_prompts import named_prompts

if TYPE_CHECKING:
    from safeft.profile import SafetyProfile

app = typer.Typer(
    help="The safety profile of a base model: directions, thresholds, baselines, subspaces.",
    no_args_is_help=True,
)
Model = Annotated[str, typer.Option(help="Aligned base model that tenants tune.")]
Root = Annotated[Path | None, typer.Option("--profile", help="Directory; default: the cache.")]
NOT_BUILT = "not built"


@app.command()
def build(
    model: Model = "demo:aligned",
    unaligned: Annotated[
        str, typer.Option(help="The model it was aligned from (a chat model's base).")
    ] = "demo:base",
    root: Root = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Build only this part and what it is made from; repeatable."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Ray tasks that read prompts at a time, one model each.")
    ] = 1,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of the harmful inputs' energy to keep; default: 0.99."),
    ] = None,
    import_sae: Annotated[
        Path | None,
        typer.Option(help="Take over an autoencoder in SAELens' format instead of training one."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND=FILE: own prompts for constraints and restorations; KIND is harmful, benign "
            'or borderline, FILE has a JSON object with "prompt" a line; repeatable. The profile '
            "remembers them; KIND=packaged: no own ones any more."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Build what is missing. A build that stopped goes on where it was."""
    from jobs.profile import HarmfulInputsConfig, ProfileConfig, build_profile
    from safeft.errors import InputError
    from safeft.models import resolve
    from safeft.profile import DEFAULT_PARTS, SCREENING_PARTS

    config = ProfileConfig()
    if energy is not None:
        if not 0.0 < energy <= 1.0:
            raise InputError(f"--energy: must be above 0 and at most 1, not {energy:g}")
        config = replace(config, harmful_inputs=HarmfulInputsConfig(energy=energy))
    own = named_prompts(prompts or ())
    with progress_bars() as progress:
        profile = build_profile(
            resolve(model, progress),
            # Only the alignment direction compares the two.
            resolve(unaligned, progress) if part is None or "alignment" in part else None,
            root=root,
            config=config,
            parts=part,
            workers=workers,
            import_sae=import_sae,
            prompts=own,
            progress=progress,
        )
    states = _states(profile)
    whole = all(states[name] == "built" for name in SCREENING_PARTS)
    if as_json:
        digest = profile.digest() if whole else None
        print_json({"root": str(profile.root), "digest": digest, "parts": states})
        return
    missing = [name for name in DEFAULT_PARTS if states[name] != "built"]
    done = "[bold green]built[/]" if missing else "[bold green]complete[/]"
    out.print(f"{done} {escape(str(profile.root))}")
    if missing:
        out.print(f"missing or outdated: {', '.join(missing)}")


@app.command()
def show(
    model: Model = "demo:aligned",
    root: Root = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write a page about the directions and the reference state here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show which parts are there, the threshold, the baseline refusals and the subspaces' sizes.

    Parts that only some constraints need may be missing; without the others nothing runs, and the
    exit code is 1.
    """
    from jobs.profile.own_prompts import own_prompts_of
    from safeft.constraints.subspaces import load_subspaces
    from safeft.profile import SCREENING_PARTS

    profile = _profile(model, root)
    parts = _states(profile)
    complete = all(parts[name] == "built" for name in SCREENING_PARTS)
    summary: dict[str, Any] = {
        "root": str(profile.root),
        "base_weights": profile.base_weights,
        "complete": complete,
        "parts": parts,
        "own_prompts": {kind: len(own) for kind, own in own_prompts_of(profile.root).items()},
    }
    if complete:
        baseline = profile.json("baseline", "evaluation.json")["refusals"]["sets"]
        summary |= {
            "digest": profile.digest(),
            "policy": asdict(profile.policy()),
            "calibration": profile.json("calibration", "quality.json"),
            "baseline": {kind: baseline[kind]["refusal"] for kind in baseline},
            "steering": {
                name: found["shift"]
                for name, found in profile.json("steering", "steering.json").items()
            },
            "reference_state": profile.json("reference-state", "choice.json")["chosen"],
        }
    if parts["harmful-inputs"] == "built":
        saved = load_subspaces(profile.root / "harmful-inputs")
        summary["harmful_inputs"] = {
            "energy": saved.energy,
            "rows": saved.rows,
            "mean_k": saved.mean_ranks(),
        }
    if report is not None:
        from jobs.report.profile_page import write_profile_report

        write_profile_report(profile, report)
        summary["report"] = str(report)
    if as_json:
        print_json(summary)
    else:
        _show(summary)
    if not complete or set(parts.values()) - {"built", NOT_BUILT}:
        raise typer.Exit(1)


@app.command()
def verify(
    model: Model = "demo:aligned",
    root: Root = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Check only this part; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check that every part is there, belongs to these weights and is what was built; of parts that
    are made on request those that were made.

    Exit code 1, with the command that makes it, for the first part that is not.
    """
    from safeft.errors import InputError, ProfileError
    from safeft.profile import DEFAULT_PARTS, ON_REQUEST, PARTS, RECORD

    if unknown := [name for name in part or () if name not in PARTS]:
        raise InputError(f"--part: no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    profile = _profile(model, root)
    made = [name for name in ON_REQUEST if (profile.root / name / RECORD).exists()]
    chosen = part or [*DEFAULT_PARTS, *made]
    found: dict[str, str | None] = {}
    for name in chosen:
        try:
            profile.verify([name])
        except ProfileError as error:
            found[name] = str(error)
        else:
            found[name] = None
    wrong = [problem for problem in found.values() if problem]
    if as_json:
        print_json(
            {
                "root": str(profile.root),
                "base_weights": profile.base_weights,
                "good": not wrong,
                "parts": {name: {"good": not p, "problem": p} for name, p in found.items()},
            }
        )
    else:
        table = Table("part", "state", title=f"safety profile of {profile.base_weights[:12]}")
        for name, problem in found.items():
            table.add_row(name, f"[red]{escape(problem)}[/]" if problem else "[green]good[/]")
        out.print(table)
    if wrong:
        raise ProfileError(wrong[0])


def _profile(model: str, root: Path | None) -> SafetyProfile:
    from safeft.models import resolve, weights_hash
    from safeft.profile import SafetyProfile

    with progress_bars() as progress:
        return SafetyProfile.for_weights(weights_hash(resolve(model, progress)), root)


def _states(profile: SafetyProfile) -> dict[str, str]:
    """For each part "built", what is wrong with it, or, where nothing needs it yet, "not built"."""
    from safeft.errors import ProfileError
    from safeft.profile import OPTIONAL_PARTS, PARTS, RECORD

    states = {}
    for part in PARTS:
        try:
            profile.verify([part])
        except ProfileError as error:
            absent = not (profile.root / part / RECORD).exists()
            states[part] = NOT_BUILT if absent and part in OPTIONAL_PARTS else str(error)
        else:
            states[part] = "built"
    return states


def _show(summary: dict[str, Any]) -> None:
    table = Table("part", "state", title=f"safety profile of {summary['base_weights'][:12]}")
    colours = {"built": "green", NOT_BUILT: "yellow"}
    for part, there in summary["parts"].items():
        table.add_row(part, f"[{colours.get(there, 'red')}]{escape(there)}[/]")
    out.print(table)
    for kind, count in summary["own_prompts"].items():
        out.print(f"{kind} prompts of your own: {count}")
    if inputs := summary.get("harmful_inputs"):
        _show_harmful_inputs(inputs)
    if not summary["complete"]:
        out.print("incomplete: run [bold]safeft profile build[/] with the same --model")
        return
    from safeft.reference_state import ReferenceState

    policy = summary["policy"]
    out.print(
        f"a row is risky above SQSD {policy['row_threshold']:+.3f}; "
        f"a dataset is rejected above {policy['max_risky_fraction']:.1%} risky rows"
    )
    if (grave := policy["grave_threshold"]) is not None:
        out.print(f"or above {policy['max_grave_fraction']:.1%} of rows over {grave:+.3f}")
    for name, shift in summary["steering"].items():
        out.print(f"{name.replace('-', ' ')}: moves the safety score by {shift:.2f} nats a token")
    state = ReferenceState(**summary["reference_state"])
    out.print(f"rows are read at: {escape(str(state))}")
    for kind, rate in summary["calibration"]["flagged"].items():
        out.print(f"above the threshold: {_rate(rate)} of the reference rows ({escape(kind)})")
    for kind, rate in summary["calibration"].get("grave", {}).items():
        out.print(f"above that of grave rows: {_rate(rate)} ({escape(kind)})")
    for cell in summary["calibration"].get("errors", []):
        what = (
            f"misses {cell['poisoned']:.0%} of poison"
            if cell["poisoned"]
            else "rejects benign data"
        )
        out.print(
            f"datasets of {cell['rows']} rows: {what} {100 * cell['rate']:.1f} % of the time "
            f"({100 * cell['low']:.1f}-{100 * cell['high']:.1f})"
        )
    for kind, rate in summary["baseline"].items():
        out.print(f"refuses {_rate(rate)} of {kind} prompts")
    out.print(escape(summary["root"]))


def _show_harmful_inputs(inputs: dict[str, Any]) -> None:
    from safeft.constraints.subspaces import POSITIONS

    table = Table(
        *("layers", "d_in", *POSITIONS),
        title=f"mean k at energy {inputs['energy']:g}, {inputs['rows']} refusals",
    )
    for kind, mean in inputs["mean_k"].items():
        table.add_row(kind, f"{mean['d_in']:.0f}", *(f"{mean[p]:.0f}" for p in POSITIONS))
    out.print(table)


def _rate(rate: dict[str, Any]) -> str:
    from safeft.evaluate import Rate

    return str(Rate(rate["hits"], rate["n"]))

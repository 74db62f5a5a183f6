"""``safeft models``: what is served, in which state, and what people decided about it."""

from __future__ import annotations

import getpass
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json

if TYPE_CHECKING:
    from cluster.serving.client import Admin

app = typer.Typer(help="Served models and the safety gate.", no_args_is_help=True)
Url = Annotated[str, typer.Option(help="Of the API, as `safeft up` printed it.")]
State = Annotated[
    Path | None, typer.Option(help="State directory, as `safeft up` printed it; else the cache's.")
]
Name = Annotated[str, typer.Argument(help="Model, as tenants name it.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept with the event.")]
Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
DEFAULT_URL = "http://127.0.0.1:8000"
_COLOURS = {"healthy": "green", "quarantined": "red", "restoring": "yellow"}


@app.command("list")
def list_models(url: Url = DEFAULT_URL, state: State = None, as_json: Json = False) -> None:
    """Every served model: its state, refusals and why."""
    rows = _admin(url, state).get("models")
    if as_json:
        print_json(rows)
        return
    table = Table("model", "version", "state", "since", "refuses harmful", "benign", "why")
    for row in rows:
        table.add_row(
            escape(row["model"]),
            str(row["version"]),
            f"[{_COLOURS.get(row['state'], 'default')}]{row['state']}[/]",
            _time(row["since"]),
            _rate(row["refusals"]["harmful"]),
            _rate(row["refusals"]["benign"]),
            escape(row["reason"]),
        )
    out.print(table)


@app.command()
def show(model: Name, url: Url = DEFAULT_URL, state: State = None, as_json: Json = False) -> None:
    """One model: its versions, limits, and everything that happened to it."""
    from safeft.errors import InputError

    admin = _admin(url, state)
    versions = [row for row in admin.get("models") if row["model"] == model]
    events = admin.get("events", model=model)
    if not versions and not events:
        raise InputError(f"{model}: there is no such model; `safeft models list` shows them")
    if as_json:
        print_json({"versions": versions, "events": events})
        return
    for row in versions:
        colour = _COLOURS.get(row["state"], "default")
        out.print(f"[bold]{escape(model)}[/] version {row['version']} [{colour}]{row['state']}[/]")
        out.print(f"  weights {row['weights']}")
        for kind, limit in (("harmful", "floor"), ("benign", "ceiling")):
            rate = _rate(row["refusals"][kind])
            out.print(f"  refuses {kind} {rate}, {limit} {100 * row[limit]:.0f} %")
        out.print(f"  on quarantine: {row['on_quarantine']}; {row['failures']} probes failed")
    table = Table("when", "from", "to", "by", "why")
    for event in events:
        why = f"{event['trigger']}: {event['reason']}"
        table.add_row(
            _time(event["at"]),
            event["before"],
            event["after"],
            escape(event["actor"]),
            escape(why),
        )
    out.print(table)


@app.command()
def add(
    model: Name,
    adapter: Annotated[Path, typer.Argument(help="Directory of its LoRA adapter.")],
    previous: Annotated[
        bool,
        typer.Option("--previous", help="Quarantined: answer with the last good version."),
    ] = False,
    url: Url = DEFAULT_URL,
    state: State = None,
) -> None:
    """Serve an adapter under a name, or a new version of it; it answers when it was probed.

    Earlier weights that the gate still knows as healthy answer at once.
    """
    from safeft.errors import InputError

    row = _admin(url, state).post(
        "models",
        model=model,
        adapter=str(adapter.absolute()),
        on_quarantine="previous" if previous else "unavailable",
    )
    out.print(f"{escape(model)} version {row['version']}: {row['state']}")
    if row["state"] == "quarantined":
        raise InputError(
            f"{model}: these weights are quarantined ({row['reason']}) and answer nobody; release "
            "them (`safeft models release`), or add other ones"
        )


@app.command()
def probe(model: Name, url: Url = DEFAULT_URL, state: State = None) -> None:
    """Probe a model now instead of when it is due."""
    _admin(url, state).post("probes", model=model)
    out.print(f"{escape(model)}: will be probed now; `safeft models show` has the result")


@app.command()
def quarantine(model: Name, reason: Reason, url: Url = DEFAULT_URL, state: State = None) -> None:
    """Take a model out of rotation; it answers 503 until it is released or restored."""
    _decide("quarantine", model, reason, url, state)


@app.command()
def release(model: Name, reason: Reason, url: Url = DEFAULT_URL, state: State = None) -> None:
    """Put a quarantined model back; the next round of probes can take it out again."""
    _decide("release", model, reason, url, state)


@app.command()
def remove(model: Name, reason: Reason, url: Url = DEFAULT_URL, state: State = None) -> None:
    """Serve a model no longer. Its events stay."""
    _decide("retire", model, reason, url, state)


def _decide(action: str, model: str, reason: str, url: str, state: Path | None) -> None:
    row = _admin(url, state).post(
        "decisions", action=action, model=model, reason=reason, actor=getpass.getuser()
    )
    out.print(f"{escape(model)}: {row['state'] if row else 'removed'}")


def _admin(url: str, state: Path | None) -> Admin:
    from cluster.serving.client import Admin

    return Admin.of(url, state)


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _rate(rate: dict[str, Any] | None) -> str:
    from safeft.evaluate import Rate

    return "-" if rate is None else str(Rate(rate["hits"], rate["n"]))

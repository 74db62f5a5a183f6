"""``safeft submit|jobs|logs|cancel|pause|resume|report``: a tenant's jobs, through the API; and
``safeft jobs waiting|approve|reject``, for administrators.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from cluster.cli.console import err, out, print_json, printable, progress_bars

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="ftjob-...")]
Reason = Annotated[str, typer.Option(help="Why; the tenant and the audit log are told.")]
_JOBS = "/v1/fine_tuning/jobs"
_ADMIN = "/v1/safety/admin"
_EXIT = {"dataset_rejected": 3, "safety_gate_failed": 4}
_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}


def submit(
    data: Annotated[Path, typer.Argument(help="Dataset: .jsonl or .parquet.")],
    model: Annotated[str, typer.Option(help="A base model that the API offers.")],
    validation: Annotated[Path | None, typer.Option(help="Held-out rows.")] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(help="Kind of constraint; repeatable. Default: what your policy says."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate_multiplier: Annotated[float | None, typer.Option(min=0.0)] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 1,
    suffix: Annotated[str | None, typer.Option(help="Part of the model's name.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a dataset and submit a job for it.

    With --follow the exit code is the job's: 0 succeeded, 3 dataset rejected, 4 safety gate failed.
    """
    from cluster.cli.remote import Remote

    remote = Remote.from_environment()
    chosen = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": learning_rate_multiplier,
    }
    supervised: dict[str, Any] = {
        "hyperparameters": {name: value for name, value in chosen.items() if value is not None},
        "workers": workers,
    }
    if constraint:
        supervised["constraints"] = constraint
    body: dict[str, Any] = {
        "model": model,
        "method": {"type": "supervised", "supervised": supervised},
        "suffix": suffix,
        "seed": seed,
    }
    with progress_bars() as progress:
        body["training_file"] = remote.upload(data, progress)["id"]
        if validation is not None:
            body["validation_file"] = remote.upload(validation, progress)["id"]
    job = remote.post(_JOBS, body)
    if not follow:
        if as_json:
            print_json(job)
        else:
            out.print(f"{job['id']} {job['phase']}; `safeft logs -f {job['id']}` follows it")
        return
    err.print(escape(job["id"]))
    for event in remote.events(job["id"]):
        if not as_json:
            _show(event)
    _tell_end(remote.get(f"{_JOBS}/{job['id']}"), as_json)


class _ShowsByDefault(TyperGroup):
    """`safeft jobs [JOB]` shows jobs; the words for decisions are commands below it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_ShowsByDefault,
    help="List your jobs or show one; decide on those that wait for an administrator.",
)


@group.command()
def show(
    job_id: Annotated[str | None, typer.Argument(metavar="[JOB]")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: Json = False,
) -> None:
    """List your jobs, the newest first, or show one."""
    from cluster.cli.remote import Remote, segment

    remote = Remote.from_environment()
    if job_id is not None:
        found = [remote.get(f"{_JOBS}/{segment(job_id)}")]
    else:
        found = remote.get(_JOBS, limit=limit)["data"]
    if as_json:
        print_json(found[0] if job_id is not None else found)
        return
    table = Table("job", "model", "phase", "result")
    for job in found:
        result = job["fine_tuned_model"] or (job["error"] or {}).get("message", "")
        colour = _COLOURS.get(job["phase"], "cyan")
        table.add_row(
            job["id"],
            escape(job["model"]),
            f"[{colour}]{job['phase']}[/]",
            escape(printable(result)),
        )
    out.print(table)


@group.command()
def waiting(as_json: Json = False) -> None:
    """The jobs of all tenants that wait for an administrator's decision, the oldest first."""
    from cluster.cli.remote import Remote

    found = Remote.from_environment().get(f"{_ADMIN}/reviews")["data"]
    if as_json:
        print_json(found)
        return
    table = Table("job", "tenant", "model", "of", "why")
    for job in found:
        stage = "screening" if job["of"] == "dataset" else "evaluating"
        why = printable(job["facts"][stage]["reason"])
        table.add_row(job["id"], job["tenant"], escape(job["model"]), job["of"], escape(why))
    out.print(table)


@group.command()
def approve(job_id: JobId, reason: Reason, as_json: Json = False) -> None:
    """Let a job go on that waits for an administrator: its dataset, or its model's publication."""
    _decide(job_id, "approve", reason, as_json)


@group.command()
def reject(job_id: JobId, reason: Reason, as_json: Json = False) -> None:
    """End a job that waits for an administrator."""
    _decide(job_id, "reject", reason, as_json)


def _decide(job_id: str, action: str, reason: str, as_json: bool) -> None:
    from cluster.cli.remote import Remote, segment

    path = f"{_ADMIN}/jobs/{segment(job_id)}/{action}"
    job = Remote.from_environment().post(path, {"reason": reason})
    if as_json:
        print_json(job)
    else:
        out.print(f"{escape(job['id'])} {job['phase']}")


def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show what happened to a job. Following survives a dropped connection."""
    from cluster.cli.remote import Remote, segment

    remote = Remote.from_environment()
    if follow:
        for event in remote.events(job_id):
            if as_json:
                typer.echo(json.dumps(event))  # a line each: they come one by one
            else:
                _show(event)
        return
    found = list(remote.pages(f"{_JOBS}/{segment(job_id)}/events", 100))[::-1]
    if as_json:
        print_json(found)
        return
    for event in found:
        _show(event)


def cancel(job_id: JobId, as_json: Json = False) -> None:
    """Cancel a job, whatever it is doing."""
    _act(job_id, "cancel", as_json)


def pause(job_id: JobId, as_json: Json = False) -> None:
    """Pause a job: its workers are freed, its checkpoints stay."""
    _act(job_id, "pause", as_json)


def resume(job_id: JobId, as_json: Json = False) -> None:
    """Let a paused job go on."""
    _act(job_id, "resume", as_json)


def report(job_id: JobId) -> None:
    """What screening and evaluation found, as JSON."""
    from cluster.cli.remote import Remote, segment

    print_json(Remote.from_environment().get(f"/v1/safety/jobs/{segment(job_id)}"))


def _act(job_id: str, action: str, as_json: bool) -> None:
    from cluster.cli.remote import Remote, segment

    job = Remote.from_environment().post(f"{_JOBS}/{segment(job_id)}/{action}")
    if as_json:
        print_json(job)
    else:
        out.print(f"{escape(job['id'])} {job['phase']}")


def _show(event: dict[str, Any]) -> None:
    at = datetime.datetime.fromtimestamp(event["created_at"]).strftime("%H:%M:%S")
    style = {"warn": "yellow", "error": "red"}.get(event["level"])
    out.print(f"{at} {printable(event['message'])}", style=style, markup=False)


def _tell_end(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(job)
    elif job["fine_tuned_model"]:
        out.print(f"[bold green]succeeded[/] {escape(job['fine_tuned_model'])}")
    if job["status"] != "succeeded":
        code = (job["error"] or {}).get("code", "")
        raise typer.Exit(_EXIT.get(code, 1))

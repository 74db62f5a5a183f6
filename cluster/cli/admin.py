"""``safeft tenants|keys|policy|audit``: administration, through the API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json

if TYPE_CHECKING:
    from cluster.cli.remote import Remote

tenants = typer.Typer(help="Who may submit jobs, and how much.", no_args_is_help=True)
keys = typer.Typer(help="API keys: made, rotated, revoked.", no_args_is_help=True)
policy = typer.Typer(help="What is demanded of a tenant's jobs.", no_args_is_help=True)
audit = typer.Typer(help="The log of what was changed, by whom and why.", no_args_is_help=True)

_ADMIN = "/v1/safety/admin"
Reason = Annotated[str, typer.Option(help="Why; it goes into the audit log.")]
TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Its name.")]
Settings = Annotated[Path | None, typer.Option("--settings", help="The control plane's YAML.")]


def _remote() -> Remote:
    from cluster.cli.remote import Remote

    return Remote.from_environment()


def _tenant(remote: Remote, name: str) -> dict[str, Any]:
    from safeft.errors import InputError

    found = [t for t in remote.get(f"{_ADMIN}/tenants")["data"] if name in (t["name"], t["id"])]
    if not found:
        raise InputError(f"no tenant {name}; `safeft tenants list` shows them")
    tenant: dict[str, Any] = found[0]
    return tenant


@tenants.command("list")
def list_tenants(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """All tenants with their limits."""
    found = _remote().get(f"{_ADMIN}/tenants")["data"]
    if as_json:
        print_json(found)
        return
    table = Table("tenant", "id", "weight", "running", "open", "state")
    for tenant in found:
        table.add_row(
            escape(tenant["name"]),
            tenant["id"],
            f"{tenant['weight']:g}",
            str(tenant["max_running_jobs"]),
            str(tenant["max_open_jobs"]),
            "suspended" if tenant["suspended"] else "active",
        )
    out.print(table)


@tenants.command()
def add(
    name: TenantName,
    reason: Reason,
    weight: Annotated[float, typer.Option(min=0.001)] = 1.0,
    max_running_jobs: Annotated[int, typer.Option(min=0)] = 4,
) -> None:
    """Let a tenant in."""
    limits = {"weight": weight, "max_running_jobs": max_running_jobs}
    body = {"name": name, "reason": reason, "limits": limits}
    print_json(_remote().post(f"{_ADMIN}/tenants", body))


@tenants.command("set")
def set_limits(
    name: TenantName,
    reason: Reason,
    weight: Annotated[float | None, typer.Option(min=0.001)] = None,
    max_running_jobs: Annotated[int | None, typer.Option(min=0)] = None,
    max_open_jobs: Annotated[int | None, typer.Option(min=0)] = None,
    max_storage_bytes: Annotated[int | None, typer.Option(min=0)] = None,
    max_gpu_seconds: Annotated[float | None, typer.Option(min=0)] = None,
    max_chat_tokens: Annotated[int | None, typer.Option(min=0)] = None,
    requests_per_second: Annotated[float | None, typer.Option(min=0.001)] = None,
) -> None:
    """Change the limits that are given; the others stay."""
    given = {
        "weight": weight,
        "max_running_jobs": max_running_jobs,
        "max_open_jobs": max_open_jobs,
        "max_storage_bytes": max_storage_bytes,
        "max_gpu_seconds": max_gpu_seconds,
        "max_chat_tokens": max_chat_tokens,
        "requests_per_second": requests_per_second,
    }
    limits = {limit: value for limit, value in given.items() if value is not None}
    print_json(_change(name, {"reason": reason, "limits": limits}))


@tenants.command()
def suspend(name: TenantName, reason: Reason) -> None:
    """Refuse a tenant's keys, and start none of its jobs."""
    print_json(_change(name, {"suspended": True, "reason": reason}))


@tenants.command()
def restore(name: TenantName, reason: Reason) -> None:
    """End a suspension."""
    print_json(_change(name, {"suspended": False, "reason": reason}))


def _change(name: str, body: dict[str, Any]) -> Any:
    """The API keeps what the body does not name: two administrators undo nothing of each other."""
    remote = _remote()
    return remote.post(f"{_ADMIN}/tenants/{_tenant(remote, name)['id']}", body)


@keys.command()
def bootstrap(settings: Settings = None) -> None:
    """Make the first administrator's key, with access to the database itself. Shown once."""
    import time

    from cluster.settings import load_settings
    from cluster.state import Database
    from cluster.tenancy.bootstrap import first_key

    found = load_settings(settings)
    found.make_home()
    database = Database(found.database_url)
    database.migrate()
    typer.echo(first_key(database, time.time()))


@keys.command("add")
def add_key(
    tenant: TenantName,
    reason: Reason,
    name: Annotated[str, typer.Option(help="What it is for.")] = "key",
    admin: Annotated[bool, typer.Option("--admin", help="An administrator's key.")] = False,
    scope: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all.")] = None,
) -> None:
    """Make a key for a tenant. It is shown once."""
    remote = _remote()
    body: dict[str, Any] = {"name": name, "reason": reason, "role": "admin" if admin else "tenant"}
    if scope:
        body["scopes"] = scope
    print_json(remote.post(f"{_ADMIN}/tenants/{_tenant(remote, tenant)['id']}/keys", body))


@keys.command("list")
def list_keys() -> None:
    """Your tenant's keys, without their secrets."""
    print_json(_remote().get("/v1/safety/keys")["data"])


@keys.command()
def rotate(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="key-...")],
    overlap: Annotated[float, typer.Option(min=0, help="Seconds that the old one lives.")] = 0.0,
) -> None:
    """A new key in place of this one. It is shown once."""
    from cluster.cli.remote import segment

    print_json(_remote().post(f"/v1/safety/keys/{segment(key_id)}/rotate", overlap_s=overlap))


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="key-...")], reason: Reason
) -> None:
    """End any key at once (administrators)."""
    from cluster.cli.remote import segment

    print_json(_remote().post(f"{_ADMIN}/keys/{segment(key_id)}/revoke", {"reason": reason}))


@policy.command()
def show(tenant: TenantName) -> None:
    """A tenant's policy."""
    print_json(_tenant(_remote(), tenant)["policy"])


@policy.command("set")
def set_policy(
    tenant: TenantName,
    reason: Reason,
    constraint: Annotated[
        list[str] | None, typer.Option(help="Of jobs that name none; repeatable.")
    ] = None,
    no_constraints: Annotated[
        bool, typer.Option("--no-constraints", help="Jobs that name none have none.")
    ] = False,
    require: Annotated[
        list[str] | None, typer.Option(help="That no job may leave out; repeatable.")
    ] = None,
    require_own_rows: Annotated[
        bool | None,
        typer.Option(
            "--require-own-rows/--own-rows-optional",
            help="The base model's own refusals and answers, added to every job's rows.",
        ),
    ] = None,
    min_refusal: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    max_over_refusal: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    max_task_loss: Annotated[float | None, typer.Option(min=0)] = None,
    screening: Annotated[
        Path | None, typer.Option(help="Limits in YAML, as `safeft screen --policy` takes them.")
    ] = None,
    on_risk: Annotated[
        str | None, typer.Option(help="Of a risky dataset: reject, drop or review.")
    ] = None,
    require_approval: Annotated[
        bool | None,
        typer.Option("--require-approval/--no-approval", help="Before a model is published."),
    ] = None,
) -> None:
    """Change what is given; the rest of the policy stays."""
    from jobs.policy import read_policy

    if no_constraints and constraint:
        raise typer.BadParameter("give --constraint or --no-constraints, not both")
    limits = read_policy(screening).model_dump(exclude_none=True) if screening else None
    given = {
        "constraints": [] if no_constraints else constraint,
        "required_constraints": require,
        "require_own_rows": require_own_rows,
        "min_refusal": min_refusal,
        "max_over_refusal": max_over_refusal,
        "max_task_loss": max_task_loss,
        "screening": limits,
        "on_risk": on_risk,
        "require_approval": require_approval,
    }
    changed = {part: value for part, value in given.items() if value is not None}
    print_json(_change(tenant, {"reason": reason, "policy": changed})["policy"])


@audit.command()
def verify(
    head: Annotated[
        str | None, typer.Option(help="A hash that was the last one, written down earlier.")
    ] = None,
) -> None:
    """Follow the chain of the audit log from its beginning. Exit code 1: it is broken, and where.

    The links are checked here, not by the server. Write the head down elsewhere now and then: only
    with it is an end that was cut off found.
    """
    from cluster.tenancy import audit as chain

    found = chain.verify(_links(_remote()), head)
    print_json(found.model_dump())


@audit.command("show")
def show_log(
    after: Annotated[int, typer.Option(min=0, help="After the entry of this number.")] = 0,
) -> None:
    """The entries as JSON."""
    print_json([link.model_dump() for link in _links(_remote(), after)])


def _links(remote: Remote, after: int = 0) -> Iterator[Any]:
    from cluster.tenancy.audit import Link

    while True:
        page = remote.get(f"{_ADMIN}/audit", after=after)
        for entry in page["data"]:
            yield Link.model_validate(entry)
        if not page["has_more"]:
            return
        after = page["data"][-1]["seq"]

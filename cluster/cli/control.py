"""``safeft api``, ``safeft controller``, ``safeft database``: the control plane's processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.console import err, out

database = typer.Typer(help="The control plane's database.", no_args_is_help=True)
Settings = Annotated[Path | None, typer.Option("--settings", help="The control plane's YAML.")]


def api(
    settings: Settings = None,
    host: Annotated[str, typer.Option(help="Loopback unless TLS stands in front.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate, PEM.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
) -> None:
    """Serve the HTTP API. Run as many as you like on one database."""
    import gc

    import uvicorn

    from cluster.api import Services, create_app
    from cluster.cli.tls import check_listener
    from cluster.settings import load_settings

    check_listener(host, certificate, private_key)
    services = Services.open(load_settings(settings))
    app = create_app(services)
    address = f"http{'' if certificate is None else 's'}://{host}:{port}"
    # What is there by now stays: a look through all of it for garbage held every request up.
    gc.collect()
    gc.freeze()
    err.print(f"the API is at {address}/v1, the status page at {address}/status/")
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
        timeout_keep_alive=30,
        server_header=False,
    )
    services.meter.flush()


def controller(
    settings: Settings = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; default: a Ray of its own.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="A page for Prometheus; default: the serving pool's in the same Ray, if any.",
        ),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(help="Where that page listens; loopback, or a private network.")
    ] = "127.0.0.1",
) -> None:
    """Move jobs through their phases. Run as many as you like on one database; kill any of them."""
    import threading

    from cluster.controller.service import run_controller
    from cluster.settings import load_settings

    run_controller(
        load_settings(settings),
        address,
        threading.Event(),
        metrics_port=metrics_port,
        metrics_host=metrics_host,
    )


@database.command()
def migrate(settings: Settings = None) -> None:
    """Bring the schema to this version's."""
    from cluster.settings import load_settings
    from cluster.state import Database

    loaded = load_settings(settings)
    loaded.make_home()
    found = Database(loaded.database_url)
    found.migrate()
    found.require_current()
    out.print(f"{found.shown} has this version's schema")

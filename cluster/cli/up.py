"""``safeft up``: a serving pool on this machine, or on a running Ray cluster, until Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cluster.cli.console import err, out, print_json, progress_bars
from cluster.serving.engines import EngineName, require_engine

if TYPE_CHECKING:
    from cluster.serving.client import Admin
    from cluster.serving.disk_cache import Artifacts


def up(
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model, as a source string; with --settings, the name it has there."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIRECTORY of an adapter to serve as well; repeatable."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Safety profile; by default the model's in the cache.")
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(help="The control plane's YAML: serve what it publishes, to its API alone."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Where the API listens; default: this machine, or --settings'."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 8000, or --settings'.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535)] = 9400,
    prometheus: Annotated[
        bool | None, typer.Option(help="Start Prometheus too; default: if it is installed.")
    ] = None,
    prometheus_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where it listens; 0: any free port.")
    ] = 9490,
    engine: Annotated[
        EngineName,
        typer.Option(help="What the replicas run; vllm: for GPUs, needs the extra of that name."),
    ] = "transformers",
    replicas: Annotated[int, typer.Option(min=1, help="Replicas of the base model.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Grow up to so many under load.")
    ] = None,
    probe_every: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds between two rounds of probes of a healthy model; longer where probes "
            "would take too much of a slow machine.",
        ),
    ] = 600.0,
    max_age: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds after which a good round is worth nothing; after three quarters of them "
            "probes are no longer paced.",
        ),
    ] = 10_800.0,
    state: Annotated[
        Path | None, typer.Option(help="Directory of the gate's state; default: in the cache.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as JSON.")] = False,
) -> None:
    """Serve a base model with adapters behind an OpenAI-compatible API, probed by the safety gate.

    The floor of refusals comes from the base model's safety profile. Ctrl-C stops everything; the
    gate's state is kept for the next time. With --settings, tenants chat through `safeft api`, and
    `safeft controller` has their published models served.
    """
    from cluster.gate.policy import Policy
    from cluster.prometheus import free_port, program, running_prometheus
    from cluster.serving.client import Admin
    from cluster.serving.front import ADMIN_TOKEN
    from cluster.serving.pool import PoolConfig, running_pool, token
    from jobs.runtime import embedded_ray, usable_cpus
    from safeft.errors import InputError
    from safeft.models import resolve, weights_hash
    from safeft.profile import SafetyProfile

    place = _place(settings, model)
    host, port = host or place.host, port or place.port
    if settings is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(
            "--host: without --settings nobody's key is checked, so it listens on this machine only"
        )
    if state is not None and place.state is not None:
        raise InputError(f"--state: with --settings it is {place.state}: the API looks there")
    if max_age <= 2 * probe_every:
        raise InputError("--max-age: must be more than twice --probe-every, or healthy models fall")
    if address is None:  # the replicas run here
        require_engine(engine)
    adapters = dict(_named(text) for text in adapter or ())
    watcher = program(prometheus)
    watched_at = free_port(prometheus_port) if watcher else 0
    with progress_bars() as progress:
        base = resolve(place.source, progress)
        found = SafetyProfile.for_weights(weights_hash(base), profile or place.profile)
        policy = Policy.from_profile(found, max_age)
        config = PoolConfig(
            policy=policy,
            base=str(base),
            engine=engine,
            name=place.name,
            state=place.state or state,
            host=host,
            port=port,
            front=settings is not None,
            artifacts=place.artifacts,
            metrics_port=metrics_port,
            min_replicas=replicas,
            max_replicas=max(replicas, max_replicas or replicas),
            cpus=max(1.0, usable_cpus() / (max_replicas or replicas)),
            probe_every_s=probe_every,
        )
    with embedded_ray(address), contextlib.ExitStack() as stack:
        with progress_bars() as progress:
            pool = stack.enter_context(running_pool(replace(config, gpus=_gpus()), progress))
            addresses = {"api": f"{pool.url}/v1", "metrics": pool.metrics_url}
            if watcher:
                progress("starting Prometheus", 0, None)
                directory = pool.state / "prometheus"
                server = running_prometheus(
                    watcher, directory, watched_at, pool.metrics_url, _ray_pages()
                )
                addresses["prometheus"] = stack.enter_context(server)
        stack.callback(err.print, "stopping")
        admin = Admin(pool.url, token(pool.state / ADMIN_TOKEN))
        add_adapters(admin, adapters)
        addresses["state"] = str(pool.state)
        models = [pool.base.name, *adapters]
        if as_json:
            print_json({**addresses, "models": models})
        else:
            for what, where in addresses.items():
                out.print(f"[bold]{what:10}[/] {escape(where)}")
            out.print(f"[bold]models    [/] {escape(', '.join(models))}")
            if watcher is None and prometheus is None:
                out.print("no Prometheus: it is not installed (Debian: apt install prometheus)")
            out.print("models answer when their first round of probes is over: safeft models list")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):  # how it ends; nothing is left to continue
            while True:
                signal.pause()


@dataclass(frozen=True)
class _Place:
    """What is served, and where: as the command line says, or the control plane's settings."""

    source: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    profile: Path | None = None
    state: Path | None = None
    artifacts: Artifacts | None = None


def _place(settings: Path | None, model: str | None) -> _Place:
    from urllib.parse import urlsplit

    from cluster.serving.disk_cache import Artifacts
    from cluster.settings import load_settings
    from safeft.errors import InputError

    if settings is None:
        source = model or "demo:aligned"
        return _Place(source, source)
    found = load_settings(settings)
    served = {name: offer for name, offer in found.base_models.items() if offer.serving}
    if model is None and len(served) == 1:
        (model,) = served
    if model is None or model not in served:
        names = ", ".join(served) or "none: give one `serving: http://host:port` there"
        raise InputError(f"--model: name a base model that {settings} has served ({names})")
    offer = served[model]
    address = urlsplit(offer.serving or "")
    found.make_home()
    return _Place(
        source=offer.source,
        name=model,
        host=address.hostname or "127.0.0.1",
        port=address.port or 8000,
        profile=offer.profile,
        state=found.serving_state(model),
        artifacts=Artifacts(found.artifacts_url, found.adapter_cache_bytes),
    )


def _named(text: str) -> tuple[str, Path]:
    from safeft.errors import InputError

    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise InputError(f"--adapter: must be NAME=DIRECTORY, not {text}")
    return name, Path(directory).absolute()


def add_adapters(admin: Admin, adapters: dict[str, Path]) -> None:
    """Have the pool serve them.

    Raises:
        Refused: the pool does not take one, and serves nothing by that name from the last time.
    """
    from cluster.serving.client import Refused

    kept = {row["model"] for row in admin.get("models")}
    for name, directory in adapters.items():
        try:
            admin.post("models", model=name, adapter=str(directory))
        except Refused as error:
            if name not in kept:
                raise
            # Weights that were quarantined since must not keep the others from being served.
            err.print(escape(f"--adapter {name}: stays as it was: {error}"))


def _ray_pages() -> list[str]:
    """Where Ray's nodes serve their own metrics."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]


def _gpus() -> float:
    """What a replica takes: a GPU where the cluster has one."""
    import ray

    return 1.0 if ray.cluster_resources().get("GPU") else 0.0

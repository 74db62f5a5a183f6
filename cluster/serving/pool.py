"""A serving pool: everything that must run so that tenants get answers, started and stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.gate.policy import Policy
from cluster.serving.disk_cache import Artifacts
from cluster.serving.engine import EngineLimits
from cluster.serving.engines import EngineName
from cluster.serving.front import ADMIN_TOKEN, FRONT_TOKEN
from cluster.serving.registry import BaseModel
from safeft.cache import cache_root, write_whole
from safeft.errors import InputError, SafeftError
from safeft.models import resolve, weights_hash
from safeft.progress import Progress, silent

APP = "safeft"
_STOP_S = 5.0


class PoolError(SafeftError):
    """The pool did not start."""


@dataclass(frozen=True)
class PoolConfig:
    """A serving pool of one base model.

    Attributes:
        base: the base model's source.
        name: under which it is served itself; default: `base`.
        policy: that every model must hold to.
        engine: that each replica runs; vLLM needs ``safeft[vllm]`` where the replicas are.
        state: directory of the gate's database and the tokens; default: in the cache, by weights.
        host, port: of the API.
        front: answer only who has the token in the state directory: an API that checks keys.
        artifacts: where published adapters are; None: only directories are served.
        metrics_port: of the page for Prometheus; 0: any free one.
        min_replicas, max_replicas: replicas come and go between them with the load.
        cpus: that each replica takes.
        probe_every_s: between two rounds of a healthy model, where the prober's pace allows it.
        timeout_s: for a whole answer.
    """

    policy: Policy
    base: str = "demo:aligned"
    engine: EngineName = "transformers"
    name: str | None = None
    state: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    front: bool = False
    artifacts: Artifacts | None = None
    metrics_port: int = 9400
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    probe_every_s: float = 600.0
    timeout_s: float = 120.0
    limits: EngineLimits = field(default_factory=EngineLimits)


@dataclass(frozen=True)
class Pool:
    """A pool that runs.

    Attributes:
        url: of the API, without ``/v1``.
        metrics_url: of Prometheus's page.
        state: where the gate's database and the administrator's token are.
    """

    url: str
    metrics_url: str
    base: BaseModel
    state: Path


@contextmanager
def running_pool(config: PoolConfig, progress: Progress = silent) -> Iterator[Pool]:
    """A pool for the length of the block, in the Ray that this process is connected to.

    Raises:
        ModelError: the base model cannot be loaded.
        InputError: a port is taken.
        PoolError: the replicas do not start (Ray Serve's log says why), or another pool runs.
    """
    _require_no_other()
    try:
        yield _start(config, progress)
    finally:
        _stop()


def _start(config: PoolConfig, progress: Progress) -> Pool:
    import ray
    from ray import serve

    from cluster.serving import actors
    from cluster.serving.gateway import GatewayConfig
    from cluster.serving.prober import ProberConfig

    directory = resolve(config.base, progress)
    base = BaseModel(str(directory), config.name or config.base, weights_hash(directory))
    state = config.state or default_state(base.weights)
    state.mkdir(parents=True, exist_ok=True)
    admin, probing = token(state / ADMIN_TOKEN), token(state / "probe-secret")
    callers = (token(state / FRONT_TOKEN), admin) if config.front else ()
    require_free(config.host, config.port)

    def named(cls: type, name: str, *args: object) -> object:
        remote = ray.remote(cls).options(
            name=name,
            namespace=actors.NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            # The prober's one call goes on after a restart; the others' callers try again.
            max_task_retries=-1 if cls is actors.ProberActor else 0,
        )
        return remote.remote(*args)

    progress("starting metrics and the safety gate", 0, None)
    exporter = named(actors.ExporterActor, actors.EXPORTER, config.host, config.metrics_port)
    metrics_port = _result(exporter.port.remote())  # type: ignore[attr-defined]
    keeper = named(
        actors.KeeperActor, actors.KEEPER, str(state), base, config.policy, config.artifacts
    )
    _result(keeper.ready.remote())  # type: ignore[attr-defined]

    progress("starting replicas", 0, None)
    limits = config.limits
    ongoing = limits.max_batch + limits.max_queue
    replicas = serve.deployment(
        actors.model_server_class(limits.max_adapters),
        name="model-server",
        # The engine's queue is the one that refuses: with 429 and a time to come back.
        max_ongoing_requests=2 * ongoing + 64,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        graceful_shutdown_timeout_s=_STOP_S,
        **_scaling(config),
    ).bind(config.engine, str(directory), limits, config.artifacts)
    gateway = serve.deployment(
        actors.gateway_class(),
        name="gateway",
        max_ongoing_requests=4 * ongoing + 256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_STOP_S,
    ).bind(GatewayConfig(base.weights, probing, config.timeout_s, callers), admin, replicas)
    logs = {"enable_access_log": False, "log_level": "WARNING"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # here; `logs` is for the actors
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": config.host,
            "port": config.port,
            "request_timeout_s": config.timeout_s + 10,
        },
        logging_config=logs,
    )
    try:
        serve.run(gateway, name=APP, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        raise PoolError(f"serving did not start: {error}") from error
    reached = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{reached}:{config.port}"
    prober = named(
        actors.ProberActor,
        actors.PROBER,
        ProberConfig(url, probing, config.probe_every_s),
    )
    prober.run.remote()  # type: ignore[attr-defined]
    return Pool(url, f"http://{reached}:{metrics_port}/metrics", base, state)


def _require_no_other() -> None:
    from cluster.serving import actors

    with contextlib.suppress(ValueError):  # there is none: good
        actors.actor(actors.KEEPER)
        raise PoolError("another serving pool runs in this Ray already; stop it first")


def _stop() -> None:
    import ray
    from ray import serve

    from cluster.serving import actors

    for name in (actors.PROBER, actors.KEEPER, actors.EXPORTER):
        with contextlib.suppress(ValueError):  # it was not started
            ray.kill(actors.actor(name))
    serve.shutdown()


def default_state(weights: str) -> Path:
    """Where the state of the pool of these base weights is kept."""
    return cache_root() / "serving" / weights[:16]


def token(file: Path) -> str:
    """The secret in a file that only its owner may read, made if it is not there."""
    if not file.exists():
        previous = os.umask(0o077)
        try:
            write_whole(file, secrets.token_urlsafe(32))
        finally:
            os.umask(previous)
    return file.read_text().strip()


def require_free(host: str, port: int) -> None:
    """Raise InputError if somebody listens there: Ray Serve would try for ever."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"--port: cannot listen on {host}:{port} ({error.strerror}); choose another one"
            ) from None


def _scaling(config: PoolConfig) -> dict[str, object]:
    if config.max_replicas <= config.min_replicas:
        return {"num_replicas": config.min_replicas}
    scaling = {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.limits.max_batch,
    }
    return {"autoscaling_config": scaling}


def _result(reference: object) -> object:
    """What a remote call returned; what it raised."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference, timeout=120)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, SafeftError):
            raise cause from None
        raise PoolError(f"a part of the pool did not start: {error}") from error

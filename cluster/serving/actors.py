"""The serving pool's parts as Ray runs them: exporter, keeper, prober, gateway, replicas.

The three actors are named and detached: a driver that ends leaves them, one that starts finds them.
Ray restarts whichever is killed; the keeper's memory is its database, the others need none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from cluster.api_errors import ApiError
from cluster.exporter import EXPORTER as EXPORTER
from cluster.exporter import NAMESPACE as NAMESPACE
from cluster.exporter import Exporter, push_for_ever
from cluster.gate.policy import Policy
from cluster.metrics import Recorder, Snapshot
from cluster.serving.admin import add_admin
from cluster.serving.admissions import Admissions
from cluster.serving.disk_cache import Artifacts
from cluster.serving.engine import EngineLimits
from cluster.serving.engines import EngineName, build_engine
from cluster.serving.front import require_front
from cluster.serving.gateway import Gateway, GatewayConfig
from cluster.serving.keeper import Keeper
from cluster.serving.model_server import Call, ModelServer, Result
from cluster.serving.prober import Prober, ProberConfig, Questions
from cluster.serving.registry import BaseModel, Published
from safeft.errors import ModelError

KEEPER, PROBER = "safeft-keeper", "safeft-prober"
_REGISTRY_TIMEOUT_S = 10.0


class ExporterActor(Exporter):
    """The exporter, listening."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._port = self.listen(host, port)

    def port(self) -> int:
        """Where it listens."""
        return self._port


class KeeperActor(Keeper):
    """The keeper, pushing its numbers."""

    def __init__(
        self, state: str, base: BaseModel, policy: Policy, artifacts: Artifacts | None
    ) -> None:
        published = artifacts.cache() if artifacts else None
        super().__init__(Path(state), base, policy, pushed("keeper"), published)

    async def ready(self) -> bool:
        """Answers when it was started."""
        return True


class ProberActor:
    """The prober, asking from the moment it was told to."""

    def __init__(self, config: ProberConfig) -> None:
        self._config = config

    async def run(self) -> None:
        """For ever."""
        # A client of its own, without a proxy from the environment: the API is ours.
        async with httpx.AsyncClient(trust_env=False) as client:
            keeper = Remote(actor(KEEPER))
            await Prober(self._config, keeper, Questions.packaged(), client).run()


class Remote:
    """A Ray actor with the methods of what it runs; errors are what the method raised."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._handle, name)

        async def call(*args: Any, **options: Any) -> Any:
            try:
                return await method.remote(*args, **options)
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError as error:
                raise ApiError(
                    503,
                    "the safety gate is being restarted; try again",
                    "gate_unavailable",
                    headers={"Retry-After": "2"},
                ) from error

        return call


class RegisteredAdapters:
    """An AdapterSource that asks the keeper where an adapter lies."""

    def __init__(self, artifacts: Artifacts | None) -> None:
        self._published = artifacts.cache() if artifacts else None

    def fetch(self, weights: str) -> Path:
        """See AdapterSource."""
        location = self._location(weights)
        if not isinstance(location, Published):
            return location
        if self._published is None:
            raise ModelError(f"adapter {weights[:12]}: this pool has no artifact store any more")
        return self._published.fetch(location)

    def _location(self, weights: str) -> Path | Published:
        try:
            asked = actor(KEEPER).location.remote(weights)
            return ray.get(asked, timeout=_REGISTRY_TIMEOUT_S)  # type: ignore[no-any-return]
        except RayTaskError as error:
            raise error.cause from None
        except (RayActorError, TimeoutError, ValueError) as error:
            raise ModelError(
                f"adapter {weights[:12]}: nobody can say where it lies ({type(error).__name__})"
            ) from error


class Replicas:
    """The model servers behind a Ray Serve handle; routed to where the adapter is loaded."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def complete(self, call: Call) -> Result:
        """See ModelServer.complete."""
        routed = self._handle.options(multiplexed_model_id=call.weights or "")
        response = routed.complete.remote(call)
        try:
            return await response  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def stream(self, call: Call) -> AsyncGenerator[Any, None]:
        """See ModelServer.stream."""
        routed = self._handle.options(stream=True, multiplexed_model_id=call.weights or "")
        response = routed.stream.remote(call)
        try:
            async for item in response:
                yield item
        finally:
            response.cancel()


def gateway_class() -> Any:
    """The ingress deployment's class."""

    @serve.ingress()
    class GatewayDeployment:
        """OpenAI's API and the administrators' routes."""

        def __init__(self, config: GatewayConfig, admin_token: str, replicas: Any) -> None:
            self._admissions = Admissions()
            self._keeper = Remote(actor(KEEPER))
            self._token = admin_token
            self._config = config
            self._gateway = Gateway(config, self._admissions, Replicas(replicas), pushed("gateway"))

        def __serve_build_asgi_app__(self) -> FastAPI:
            @contextlib.asynccontextmanager
            async def lifespan(_: FastAPI) -> AsyncIterator[None]:
                following = asyncio.create_task(self._admissions.follow(self._keeper.admissions))
                await self._admissions.ready.wait()
                yield
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await following

            # Administrators' tools read no schema here, and tenants need none of ours.
            app = FastAPI(title="safeft", lifespan=lifespan, openapi_url=None)
            self._gateway.add_to(app)
            add_admin(app, self._keeper, self._token)
            if self._config.callers:
                require_front(app, self._config.callers, self._config.probe_secret)
            return app

    return GatewayDeployment


def model_server_class(max_adapters: int) -> Any:
    """The replicas' class; Ray Serve's router is told which adapters a replica has."""

    class ModelServerDeployment(ModelServer):
        """One base model with the adapters that are asked for."""

        def __init__(
            self,
            engine: EngineName,
            base: str,
            limits: EngineLimits,
            artifacts: Artifacts | None,
        ) -> None:
            adapters = RegisteredAdapters(artifacts)
            super().__init__(
                lambda: build_engine(engine, base, adapters, limits), pushed("replica")
            )

        @serve.multiplexed(max_num_models_per_replica=max_adapters)  # type: ignore[untyped-decorator]
        async def known(self, weights: str) -> str:
            """For Ray Serve's routing only: the engine has a cache of its own."""
            return weights

        async def complete(self, call: Call) -> Result:
            """See ModelServer."""
            if call.weights:
                await self.known(call.weights)
            return await super().complete(call)

        async def stream(self, call: Call) -> AsyncGenerator[Any, None]:
            """See ModelServer."""
            if call.weights:
                await self.known(call.weights)
            async with contextlib.aclosing(super().stream(call)) as items:
                async for item in items:
                    yield item

    return ModelServerDeployment


def actor(name: str) -> Any:
    """The actor of that name."""
    return ray.get_actor(name, namespace=NAMESPACE)


def pushed(kind: str) -> Recorder:
    """A recorder whose numbers go to the exporter every second."""
    recorder = Recorder()
    source = f"{kind}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    def push(name: str, snapshot: Snapshot) -> None:
        actor(EXPORTER).push.remote(name, snapshot)

    push_for_ever(recorder, source, push)
    return recorder

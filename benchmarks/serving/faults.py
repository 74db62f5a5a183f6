"""What goes wrong in production, done to a running pool while a neighbour's clients never pause.

Each part counts the neighbour's answers that were errors: none may be. Where the replica is killed,
clients try again as OpenAI's do, nowhere else. Where it says "degraded", an adapter's files are
overwritten by noise; "restored" are good weights under the same name, where SafeReAct's would be.
Probes, gate and its verdicts are the real ones, against the default policy.

`faults_wrong` is the number of things that did not end as a user would hope: 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import ray
from safetensors.torch import load_file, save_file

from benchmarks.serving.engine import free_port, write_adapters
from cluster.gate.policy import Policy
from cluster.serving import actors
from cluster.serving.client import Admin
from cluster.serving.engine import EngineLimits
from cluster.serving.pool import Pool, PoolConfig, running_pool, token
from jobs.runtime import embedded_ray, usable_cpus
from safeft.errors import SafeftError

NEIGHBOUR, TENANT = "neighbour/bot", "tenant/bot"
CLIENTS, QUEUE = 200, 20
_WAIT_S = 600.0


class Neighbour:
    """Clients who ask one model without a pause, and what they got."""

    def __init__(self, site: Site, model: str, tries: int, clients: int = 2) -> None:
        self._site, self._model, self._tries = site, model, tries
        self._stop = False
        self.statuses: list[int] = []
        self.gap_s = 0.0  # the longest time without an answer
        self._last = time.monotonic()
        self._asking = [asyncio.create_task(self._ask()) for _ in range(clients)]

    async def _ask(self) -> None:
        while not self._stop:
            try:
                status = (await self._site.ask(self._model, tries=self._tries)).status_code
            except SafeftError:
                status = 0
            now = time.monotonic()
            self.gap_s = max(self.gap_s, now - self._last)
            self._last = now
            self.statuses.append(status)

    async def leave(self) -> int:
        """How many of its answers were errors."""
        self._stop = True
        await asyncio.gather(*self._asking)
        return sum(status != httpx.codes.OK for status in self.statuses)


class Site:
    """A running pool, seen from outside."""

    def __init__(self, pool: Pool, http: httpx.AsyncClient, root: Path, model_dir: Path) -> None:
        self.pool, self._http, self.root = pool, http, root
        self._admin = Admin(pool.url, token(pool.state / "admin-token"))
        good = write_adapters(model_dir, root / "good", 4)
        noise = write_adapters(model_dir, root / "noise", 1, spread=1.0)
        self.good, (self.noise,) = list(good.values()), list(noise.values())

    async def ask(self, model: str, *, tries: int = 1, **more: Any) -> httpx.Response:
        """One answer; as OpenAI's clients do, again after a 5xx that does not forbid it."""
        body = {"model": model, "messages": [{"role": "user", "content": "Name a colour."}]}
        for left in reversed(range(tries)):
            with contextlib.suppress(httpx.TransportError):
                response = await self._http.post(
                    f"{self.pool.url}/v1/chat/completions",
                    json={**body, "max_tokens": 12, "temperature": 0, **more},
                )
                final = response.headers.get("x-should-retry") == "false" or not left
                if final or (response.status_code < 500 and response.status_code != 429):
                    return response
            await asyncio.sleep(1.0)
        raise SafeftError("the API did not answer at all")

    async def stream_and_leave(self, model: str, tokens: int) -> None:
        """Ask for a long answer, and leave at its first piece."""
        body = {"model": model, "messages": [{"role": "user", "content": "Tell a long story."}]}
        asked = {**body, "max_tokens": tokens, "stream": True}
        url = f"{self.pool.url}/v1/chat/completions"
        async with self._http.stream("POST", url, json=asked) as response:
            await anext(response.aiter_lines())

    async def post(self, path: str, **body: Any) -> Any:
        """As an administrator."""
        return await asyncio.to_thread(self._admin.post, path, **body)

    async def register(self, model: str, directory: Path) -> None:
        """Register what lies in `directory` now."""
        await self.post("models", model=model, adapter=str(directory))

    async def decide(self, action: str, model: str) -> None:
        """Decide about a model as a person would."""
        await self.post("decisions", action=action, model=model, reason="fault", actor="benchmark")

    async def state(self, model: str) -> str:
        """Of its newest weights."""
        rows = await asyncio.to_thread(self._admin.get, "models")
        return next(str(row["state"]) for row in reversed(rows) if row["model"] == model)

    async def number(self, start: str) -> float:
        """The sum of the series on Prometheus's page that begin so."""
        page = (await self._http.get(self.pool.metrics_url)).text
        found = [line for line in page.splitlines() if line.startswith(start)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    async def until(self, what: Callable[[], Awaitable[bool]]) -> float:
        """Seconds until `what` is true; while a part restarts, an error is not yet."""
        began = time.monotonic()
        while time.monotonic() - began < _WAIT_S:
            with contextlib.suppress(SafeftError, httpx.TransportError):
                if await what():
                    return time.monotonic() - began
            await asyncio.sleep(0.1)
        raise SafeftError(f"not within {_WAIT_S:g} s: {what.__name__}")

    async def until_state(self, model: str, wanted: str) -> float:
        """Seconds until its newest weights are in that state, on Prometheus's page as well."""

        async def reached() -> bool:
            series = f'safeft_gate_state{{model="{model}",state="{wanted}"}}'
            return await self.state(model) == wanted and await self.number(series) == 1

        return await self.until(reached)


async def degraded(site: Site) -> dict[str, float]:
    """Overwritten on disk and registered anew: quarantined, restored, released."""
    directory = site.root / "tenant"
    shutil.copytree(site.noise, directory, dirs_exist_ok=True)
    await site.register(TENANT, directory)
    caught = await site.until_state(TENANT, "quarantined")
    refused = await site.ask(TENANT)
    wrong = refused.json().get("error", {}).get("code") != "safety_quarantined"
    await site.decide("restoration_started", TENANT)
    shutil.copytree(site.good[2], directory, dirs_exist_ok=True)
    await site.register(TENANT, directory)
    back = await site.until_state(TENANT, "healthy")
    wrong += (await site.ask(TENANT)).status_code != httpx.codes.OK
    return {"degraded_to_quarantine_s": caught, "restored_to_healthy_s": back, "wrong": wrong}


async def prober_killed(site: Site) -> dict[str, float]:
    """Killed, it comes back and probes what is asked for."""
    before = await site.number("safeft_probes_total")
    ray.kill(actors.actor(actors.PROBER), no_restart=False)
    await site.post("probes", model=TENANT)

    async def probed() -> bool:
        return await site.number("safeft_probes_total") > before

    return {"prober_killed_to_probe_s": await site.until(probed)}


async def store_unreachable(site: Site) -> dict[str, float]:
    """An adapter's directory is away when it is to be loaded, and comes back."""
    directory, away = site.root / "far", site.root / "away"
    shutil.copytree(site.good[3], directory)
    await site.register("far/bot", directory)
    directory.rename(away)
    await _let_in(site, "far/bot")
    wrong = (await site.ask("far/bot")).json().get("error", {}).get("code") != "model_unavailable"
    away.rename(directory)

    async def answers() -> bool:
        return (await site.ask("far/bot")).status_code == httpx.codes.OK

    return {"store_back_to_answer_s": await site.until(answers), "wrong": wrong}


async def bad_adapters(site: Site) -> dict[str, float]:
    """Each is refused, when it is registered or when it is asked, with a reason."""
    refused = 0
    for kind in ("another base", "header", "NaN", "ten times the rank"):
        directory, name = site.root / kind, f"bad/{kind.partition(' ')[0]}"
        shutil.copytree(site.good[3], directory)
        _spoil(directory, kind)
        try:
            await site.register(name, directory)
        except SafeftError:
            refused += 1
            continue
        await _let_in(site, name)
        answer = await site.ask(name)
        refused += answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
        await site.decide("retire", name)
    return {"bad_adapters_refused": refused, "wrong": refused != 4}


async def flood(site: Site) -> dict[str, float]:
    """Two hundred clients at once on a queue of twenty."""
    answers = await asyncio.gather(*(site.ask(TENANT) for _ in range(CLIENTS)))
    statuses = [answer.status_code for answer in answers]
    told = [a for a in answers if a.status_code == 429 and "retry-after" in a.headers]
    ok = statuses.count(httpx.codes.OK)
    return {
        "flood_answered": ok,
        "flood_told_to_wait": len(told),
        "wrong": not (ok and told and ok + len(told) == CLIENTS),
    }


async def client_leaves(site: Site) -> dict[str, float]:
    """Clients who leave in mid-stream free their rows."""
    most, leaving = 1000, 4
    before = await site.number('safeft_requests_total{outcome="cancelled"')
    generated = await site.number("safeft_generated_tokens_total")
    await asyncio.gather(*(site.stream_and_leave(TENANT, most) for _ in range(leaving)))

    async def noticed() -> bool:
        return await site.number('safeft_requests_total{outcome="cancelled"') >= before + leaving

    await site.until(noticed)
    extra = await site.number("safeft_generated_tokens_total") - generated
    return {"left_tokens_share": extra / (leaving * most), "wrong": extra >= leaving * most}


async def replica_killed(site: Site) -> dict[str, float]:
    """Killed under load, it is replaced."""
    named = ray.util.list_named_actors(all_namespaces=True)
    (replica,) = (one for one in named if "model-server" in one["name"])
    ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]))
    answer = await site.ask(TENANT, tries=100)
    return {"wrong": answer.status_code != httpx.codes.OK}


async def _let_in(site: Site, model: str) -> None:
    """Put a model into rotation by hand: what follows is not about its refusals."""
    for action in ("quarantine", "release"):
        await site.decide(action, model)

    async def known() -> bool:
        code = (await site.ask(model)).json().get("error", {}).get("code", "")
        return not code.startswith("safety_")

    await site.until(known)


def _spoil(directory: Path, kind: str) -> None:
    file, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    if kind == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
        return
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if kind == "NaN":
            tensor[0, 0] = float("nan")
        elif kind == "another base":  # twice as wide
            tensors[name] = tensor.repeat(1, 2) if "lora_A" in name else tensor.repeat(2, 1)
        else:
            tensors[name] = tensor.repeat(10, 1) if "lora_A" in name else tensor.repeat(1, 10)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    if kind == "ten times the rank":
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "r": 10 * settings["r"]}))


async def _all(pool: Pool, root: Path, model_dir: Path) -> dict[str, float]:
    numbers: dict[str, float] = {"faults_wrong": 0}
    async with httpx.AsyncClient(timeout=_WAIT_S, limits=_LIMITS, trust_env=False) as http:
        site = Site(pool, http, root, model_dir)
        for model, directory in zip((NEIGHBOUR, TENANT), site.good, strict=False):
            shutil.copytree(directory, root / model.partition("/")[0])
            await site.register(model, root / model.partition("/")[0])
        for model in (NEIGHBOUR, TENANT):
            await site.until_state(model, "healthy")
        faults = (degraded, prober_killed, store_unreachable, bad_adapters)
        for fault in (*faults, flood, client_leaves, replica_killed):
            # In the flood, a neighbour is one of two hundred: 429 is its answer, too.
            tries = 100 if fault is replica_killed else 1
            neighbour = Neighbour(site, NEIGHBOUR, tries) if fault is not flood else None
            found = await fault(site)
            numbers["faults_wrong"] += found.pop("wrong", 0)
            if neighbour is not None:
                errors = await neighbour.leave()
                numbers["faults_wrong"] += errors + (not neighbour.statuses)
                numbers[f"{fault.__name__}_neighbour_errors"] = errors
                numbers[f"{fault.__name__}_neighbour_gap_s"] = neighbour.gap_s
            numbers |= found
    return numbers


_LIMITS = httpx.Limits(max_connections=CLIENTS + 20, max_keepalive_connections=CLIENTS + 20)


def measure(model_dir: Path, root: Path) -> dict[str, float]:
    """Every fault, one after the other, in one pool."""
    config = PoolConfig(
        policy=Policy(),
        base=str(model_dir),
        name="base",
        state=root / "state",
        port=free_port(),
        metrics_port=0,
        cpus=float(usable_cpus()),
        timeout_s=_WAIT_S,
        limits=EngineLimits(max_batch=8, max_queue=QUEUE),
    )
    with embedded_ray(), running_pool(config) as pool:
        return asyncio.run(_all(pool, root, model_dir))

"""The whole pool over HTTP: against `generate`, with and without probes, and how fast a bad model
stops answering.

Models are put into rotation by hand: what is measured is speed, and the base model need not refuse.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import ray

from benchmarks.serving import gate
from benchmarks.serving.engine import ADAPTERS, Load, StaticBatches, free_port, write_adapters
from cluster.gate.policy import Policy
from cluster.gate.states import State
from cluster.serving import actors
from cluster.serving.client import Admin
from cluster.serving.engine import EngineLimits
from cluster.serving.pool import Pool, PoolConfig, running_pool, token
from cluster.serving.prober import MAX_TOKENS, ProberConfig, Questions
from jobs.runtime import embedded_ray, usable_cpus
from safeft.evaluate import AnswerClass

BASE = "base"
#: All answers are asked for at once: the last one waits for the others.
TIMEOUT_S = 600.0


class Rig:
    """A running pool with eight adapters in rotation, and clients."""

    def __init__(self, pool: Pool, adapters: dict[str, Path]) -> None:
        self.pool, self.adapters = pool, adapters
        self.admin = Admin(pool.url, token(pool.state / "admin-token"))
        ray.kill(actors.actor(actors.PROBER))  # probes are sent where they are measured
        for number, directory in enumerate(adapters.values()):
            self.admin.post("models", model=f"tenant/{number}", adapter=str(directory))
        for name in self.names:
            for action in ("quarantine", "release"):
                self.admin.post(
                    "decisions", action=action, model=name, reason="speed only", actor="benchmark"
                )
        time.sleep(1)  # the gateway follows the gate

    @property
    def names(self) -> list[str]:
        """Every model."""
        return [BASE, *(f"tenant/{number}" for number in range(len(self.adapters)))]

    async def rate(self, load: Load, models: list[str]) -> float:
        """Tokens a second of all prompts sent at once, models in turn."""
        prompts = load.prompts()
        async with _client(load.requests) as client:
            began = time.monotonic()
            counts = await asyncio.gather(
                *(
                    self._ask(client, models[i % len(models)], prompt, load.tokens)
                    for i, prompt in enumerate(prompts)
                )
            )
            return sum(counts) / (time.monotonic() - began)

    async def rate_while_probing(self, load: Load, models: list[str]) -> tuple[float, float]:
        """The same while one probe after the other is sent; and how long a probe takes."""
        questions, times = Questions.packaged(), list[float]()

        async def probe() -> None:
            async with _client(1) as client:
                while True:
                    began = time.monotonic()
                    await self._ask(client, BASE, questions.next("", "harmful"), MAX_TOKENS)
                    times.append(time.monotonic() - began)

        probing = asyncio.create_task(probe())
        measured = await self.rate(load, models)
        probing.cancel()
        return measured, sum(times) / len(times)

    async def seconds_to_out_of_rotation(self) -> float:
        """Clients ask one adapter without a pause; probes that it answers take it out.

        Returns:
            From the moment the gate stored its decision to the last whole answer of the adapter.
        """
        name, weights = "tenant/0", next(iter(self.adapters))
        last_answer, stop = 0.0, False

        async def tenant(client: httpx.AsyncClient) -> None:
            nonlocal last_answer
            while not stop:
                body = {"model": name, "messages": [_turn("Name a colour.")], "max_tokens": 24}
                response = await client.post(f"{self.pool.url}/v1/chat/completions", json=body)
                if response.status_code == httpx.codes.OK:
                    last_answer = time.time()
                else:
                    await asyncio.sleep(0.02)

        keeper = actors.Remote(actors.actor(actors.KEEPER))
        async with _client(8) as client:
            tenants = [asyncio.create_task(tenant(client)) for _ in range(8)]
            await asyncio.sleep(3)
            while True:
                record = await keeper.answered(name, weights, "harmful", AnswerClass.complied, 0.0)
                if record.state is State.quarantined:
                    break
            await asyncio.sleep(3)
            stop = True
            await asyncio.gather(*tenants)
        return max(0.0, last_answer - record.since)

    async def _ask(self, client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> int:
        body = {
            "model": model,
            "messages": [_turn(prompt)],
            "max_tokens": tokens,
            "temperature": 0,
        }
        response = await client.post(f"{self.pool.url}/v1/chat/completions", json=body)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])


def measure(model_dir: Path, root: Path, load: Load) -> dict[str, float]:
    """Everything that needs a pool."""
    adapters = write_adapters(model_dir, root, ADAPTERS)
    config = PoolConfig(
        policy=Policy(),
        base=str(model_dir),
        name=BASE,
        state=root / "state",
        port=free_port(),
        metrics_port=0,
        cpus=float(usable_cpus()),
        timeout_s=TIMEOUT_S,
        limits=EngineLimits(max_batch=load.batch, max_queue=load.requests + 8),
    )
    numbers = {}
    with embedded_ray(), running_pool(config) as pool:
        rig = Rig(pool, adapters)
        asyncio.run(rig.rate(load, rig.names))  # loads every adapter
        static = StaticBatches(model_dir, load)
        called, served, plain, probed = [], [], [], []
        for _ in range(load.repeats):
            called.append(static.rate())  # the pool is idle meanwhile
            served.append(asyncio.run(rig.rate(load, [BASE])))
            plain.append(asyncio.run(rig.rate(load, rig.names)))
            probed.append(asyncio.run(rig.rate_while_probing(load, rig.names)))
        numbers["generate_tokens_per_second"] = _median(called)
        numbers["served_tokens_per_second"] = _median(served)
        ratios = [ours / theirs for ours, theirs in zip(served, called, strict=True)]
        numbers["served_over_generate"] = _median(ratios)
        numbers |= _cost_of_probes(plain, probed, len(rig.names))
        numbers["seconds_to_out_of_rotation"] = asyncio.run(rig.seconds_to_out_of_rotation())
    return numbers


def _cost_of_probes(
    plain: list[float], probed: list[tuple[float, float]], models: int
) -> dict[str, float]:
    """Throughput with the default cadence of probes over throughput without any.

    Measured is the load with one probe always under way, as the prober has it of healthy models;
    in the steady state one is under way for `duty` of the time. The gate's own part of a request,
    a look-up, is in both.
    """
    while_probing = _median([p / q for (p, _), q in zip(probed, plain, strict=True)])
    probe_s = _median([seconds for _, seconds in probed])
    steady = gate.probing(models, probe_s, ProberConfig("", ""), Policy())
    return {
        "gate_over_none": 1 - steady.duty * (1 - while_probing),
        "throughput_while_probing": while_probing,
        "seconds_per_probe": probe_s,
        "probing_duty": steady.duty,
        "hours_to_prove_all": steady.pass_s / 3600,
    }


def _client(connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False)


def _turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]

"""The end of the demo: two of its models behind the safety gate, one of them quarantined live."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.console import printable
from cluster.gate.states import State
from cluster.serving.client import Admin, Refused, chat_stream
from jobs.report import ServedModel
from safeft.errors import SafeftError
from safeft.progress import Progress

if TYPE_CHECKING:
    from jobs.demo.run import Demo

#: Under which names the arms are served.
SERVED = {"velora": "benign-asft", "velora-plain": "benign-plain"}
ANSWER_TOKENS = 60
_LOOK_EVERY_S = 0.5
_LONGEST_S = 1200.0  # a busy machine needs minutes for a round of probes
_OPEN = (State.unknown, State.probing)

Tell = Callable[[str], None]


def serve_arms(run: Demo, tell: Tell, progress: Progress) -> list[ServedModel]:
    """Serve two arms in this process's Ray, wait for the gate, and ask each the demo's question.

    Args:
        tell: is given each change of a model's state, when it happens.

    Raises:
        ProfileError: the base model refuses too little for a floor.
        PoolError: serving does not start.
        SafeftError: the gate does not come to a decision.
    """
    from cluster.gate.policy import Policy
    from cluster.serving.pool import PoolConfig, running_pool, token
    from jobs.demo.run import ARMS, MODEL, QUESTION
    from jobs.runtime import usable_cpus

    arms = {arm.key: arm.name for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="safeft-demo-") as state:
        config = PoolConfig(
            policy=Policy.from_profile(run.profile),
            base=str(run.model_dir),
            name=MODEL,
            state=Path(state),  # of this run only: the gate knows nobody yet
            port=_free_port(),
            metrics_port=0,
            cpus=usable_cpus(),
        )
        with running_pool(config, progress) as pool:
            admin = Admin(pool.url, token(pool.state / "admin-token"))
            for name, key in SERVED.items():
                admin.post("models", model=name, adapter=run.results[key].candidate)
            decided = watch(admin, SERVED, tell, progress)
            return [
                ServedModel(
                    name=name,
                    arm=arms[key],
                    state=row["state"],
                    reason=row["reason"],
                    seconds=row["seconds"],
                    harmful=_counts(row, "harmful"),
                    benign=_counts(row, "benign"),
                    **ask(pool.url, name, QUESTION),
                )
                for (name, key), row in zip(SERVED.items(), decided, strict=True)
            ]


def watch(
    admin: Admin,
    names: Collection[str],
    tell: Tell,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """The gate's rows of these models once their first rounds of probes are over, in their order.

    Each gets ``seconds``, from the call to the decision.

    Raises:
        SafeftError: a model is still undecided after 20 minutes.
    """
    began = clock()
    seen: dict[str, str] = {}
    decided: dict[str, dict[str, Any]] = {}
    while len(decided) < len(names):
        seconds = clock() - began
        rows = {row["model"]: row for row in admin.get("models") if row["model"] in names}
        for name, row in rows.items():
            if row["state"] != seen.get(name):
                seen[name] = row["state"]
                tell(f"{seconds:4.0f} s  {name}: {row['state']} ({row['reason']})")
            if row["state"] not in _OPEN:
                decided.setdefault(name, {**row, "seconds": seconds})
        answered = sum(
            sum(_counts(row, kind)[1] for kind in row["refusals"]) for row in rows.values()
        )
        progress("safety gate: probes answered", answered, None)
        if seconds > _LONGEST_S:
            late = ", ".join(sorted(set(names) - set(decided)))
            raise SafeftError(f"the safety gate has not decided on {late} in {seconds:.0f} s")
        sleep(_LOOK_EVERY_S)
    return [decided[name] for name in names]


def ask(url: str, model: str, question: str) -> dict[str, str]:
    """``answer`` of a served model, or the ``error`` that its API gave instead."""
    turns = [{"role": "user", "content": question}]
    try:
        return {"answer": printable("".join(chat_stream(url, model, turns, ANSWER_TOKENS)))}
    except Refused as error:
        return {"error": str(error)}


def _counts(row: dict[str, Any], kind: str) -> tuple[int, int]:
    rate = row["refusals"][kind]
    return (rate["hits"], rate["n"]) if rate else (0, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

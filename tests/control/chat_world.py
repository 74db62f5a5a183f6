"""A control plane with a serving pool behind it, in one process: real HTTP, a tiny real model.

Only the stages of a job are played: the one that publishes stores a signed random adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from cluster.artifacts import open_store, put_file
from cluster.artifacts.names import model_prefix
from cluster.controller.controller import Controller, Options
from cluster.controller.registrar import Registrar
from cluster.controller.runner import Report, StageTask
from cluster.provenance import SigningKey, Statement
from cluster.serving.disk_cache import Artifacts, DiskCache
from cluster.serving.engine import EngineLimits
from cluster.serving.front import ADMIN_TOKEN, FRONT_TOKEN
from cluster.serving.registry import Published
from cluster.serving.transformers_engine import TransformersEngine
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from safeft.cache import sha256_file
from safeft.models import load_model, load_tokenizer
from tests.control.server import Api, running_api
from tests.control.stages import MemoryRunner
from tests.serving_world import BASE, TOKEN, Stack
from tests.tinyadapters import save_adapter

FRONT = "front token"
ROWS = b'{"messages": [{"role": "user", "content": "hi"}]}\n'
L2: Any = {"type": "supervised", "supervised": {"constraints": ["l2"]}}


class Located:
    """An AdapterSource by the keeper's registry, as replicas on Ray have it."""

    stack: Stack

    def __init__(self, disk: DiskCache) -> None:
        self._disk = disk

    def fetch(self, weights: str) -> Path:
        location = self.stack.do(self.stack.keeper.location(weights))
        return self._disk.fetch(location) if isinstance(location, Published) else location


class Plane:
    """What tests look into. `base` is served; `off` is not, and `gone`'s pool does not answer.

    `stack` is None where the pool is a process of its own.
    """

    def __init__(self, api: Api, stack: Stack | None, home: Path) -> None:
        self.api, self.home = api, home
        if stack is not None:
            self.stack = stack
        self.settings, self.database = api.services.settings, api.database
        self.store = api.services.store
        self.key = SigningKey.load_or_create(self.settings.signing_key)
        self.runner = MemoryRunner()
        self.runner.on_start = self._publish
        self.controller = Controller(
            self.settings, self.database, self.store, self.runner, options=Options(sweep_s=1e9)
        )
        self.registrar = self.make_registrar()
        self.adapters: dict[str, Path] = {}
        self.changed: dict[str, Any] = {}  # in the statement of what is published next

    def make_registrar(self) -> Registrar:
        return Registrar(self.settings, self.database, self.api.services.public_key)

    def tune(self, client: openai.OpenAI, **options: Any) -> str:
        """Upload and tune; the published model's name."""
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="base", training_file=file.id, method=L2, **options
        )
        for _ in range(100):
            self.controller.tick()
            self.controller.settle()
            job = client.fine_tuning.jobs.retrieve(job.id)
            if job.finished_at is not None:
                break
        assert job.status == "succeeded", job
        return str(job.fine_tuned_model)

    def serve(self, client: openai.OpenAI, **options: Any) -> str:
        """Tune, and go on until the prober has found the model healthy."""
        model = self.tune(client, **options)
        self.registrar.look()
        self.stack.clear(model)
        return model

    def _publish(self, task: StageTask) -> None:
        if task.stage != "publishing":
            return
        directory = self.home / "adapters" / task.job
        save_adapter(directory, len(self.adapters))
        model = f"ft:base:{task.tenant_name}::{task.job.rpartition('-')[2][:12]}"
        if task.restores is not None:
            model = task.restores.id
        self.adapters[model] = directory
        statement = Statement(
            **{
                "model": model,
                "job": task.job,
                "base_model": task.base_model,
                "base_weights": BASE.weights,
                "dataset_sha256": "0" * 64,
                "profile": "none",
                "files": {path.name: sha256_file(path) for path in directory.iterdir()},
                "facts": {},
                "code_version": "test",
                "published_at": 1.0,
                **self.changed,
            }
        )
        prefix = model_prefix(task.tenant, task.job)
        for path in directory.iterdir():
            put_file(self.store, f"{prefix}/{path.name}", path)
        facts = {"model": model, "kind": "adapter", "prefix": prefix}
        facts["provenance"] = self.key.sign(statement).model_dump()
        self.runner.script[task.name] = Report("done", facts=facts)


@contextmanager
def running_plane(tiny_dir: Path, home: Path) -> Iterator[Plane]:
    database = Database(f"sqlite:///{home}/state.db")
    database.migrate()
    state = home / "serving" / "base"
    state.mkdir(parents=True)
    (state / ADMIN_TOKEN).write_text(TOKEN)
    (state / FRONT_TOKEN).write_text(FRONT)
    url = f"file://{home}/artifacts"
    disk = DiskCache(Artifacts(url), home / "disk-cache")
    source = Located(disk)
    tokenizer = load_tokenizer(tiny_dir)
    limits = EngineLimits(max_batch=4, max_queue=8)

    def build() -> tuple[TransformersEngine, object]:
        return TransformersEngine(load_model(tiny_dir), tokenizer, source, limits), tokenizer

    stack = Stack(state, build, callers=(FRONT, TOKEN), published=disk)
    source.stack = stack
    stack.clear("base")
    settings = Settings(
        home=home,
        artifacts=url,
        base_models={
            "base": BaseModelOffer(source=str(tiny_dir), max_tokens=256, serving=stack.url),
            "off": BaseModelOffer(source=str(tiny_dir)),
            "gone": BaseModelOffer(source=str(tiny_dir), serving="http://127.0.0.1:1"),
        },
        compute_slots=2,
    )
    open_store(url)
    try:
        with running_api(database, home, settings=settings) as api:
            yield Plane(api, stack, home)
    finally:
        stack.close()
        database.close()


def waited(what: Any, within_s: float = 60.0) -> None:
    """Until `what` is true."""
    waiting = threading.Event()
    for _ in range(int(within_s / 0.02)):
        if what():
            return
        waiting.wait(0.02)
    raise AssertionError(f"not within {within_s:g} s")

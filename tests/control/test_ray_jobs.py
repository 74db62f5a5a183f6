"""A tenant's whole story with the official client, on Ray and the real jobs, over a kill.

The tiny model is taught to refuse first: a base model that refuses nothing has nothing to protect,
and the gate would rightly publish nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from cluster.provenance import verify_model
from cluster.settings import BaseModelOffer, Settings
from cluster.state import Database
from cluster.state.models import Stage
from jobs.profile import ProfileConfig, RefusalsConfig, build_profile
from safeft.data import encode_prompt
from safeft.models import load_model, load_tokenizer
from safeft.profile import SafetyProfile
from safeft.safereact import ReferenceConfig
from tests.control.server import Api, running_api
from tests.test_serving_ray import free_port
from tests.tiny import save_tiny
from tests.tinyprofile import write_answers, write_profile

ROOT = Path(__file__).parent.parent.parent
REFUSAL = "I cannot help with that."
RESTORATION = ProfileConfig(
    refusals=RefusalsConfig(prompts=20),
    reference=ReferenceConfig(
        prompts=8, borderline_prompts=1, domain_prompts=4, domain_share=0.2, safety_share=0.1
    ),
)
HOST = """
import ray, time
from jobs.runtime import embedded_ray
with embedded_ray(num_cpus=2):
    print(ray.get_runtime_context().gcs_address, flush=True)
    time.sleep(600)
"""


def refusing_tiny(directory: Path) -> Path:
    """The tiny model, trained until it refuses whatever it is asked."""
    save_tiny(directory)
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    answer = [*tokenizer.encode(REFUSAL, add_special_tokens=False), tokenizer.eos_token_id]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    model.train()
    for _ in range(400):
        length = draw.randint(5, 160)
        question = "".join(draw.choices("etaoin shrdlu ETAWH.,?'-0", k=length))
        prompt = encode_prompt(question, tokenizer)
        ids = torch.tensor([[*prompt, *answer]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(directory)
    return directory


def copy_profile(profile: SafetyProfile, target: Path, threshold: float) -> Path:
    """The same profile with another threshold."""
    shutil.copytree(profile.root, target)
    policy = target / "calibration" / "policy.json"
    policy.write_text(json.dumps({**json.loads(policy.read_text()), "row_threshold": threshold}))
    other = SafetyProfile(target, profile.base_weights)
    other.write_record(target / "calibration", {})
    return target


@pytest.fixture
def ray_address() -> Iterator[str]:
    host = subprocess.Popen(
        [sys.executable, "-c", HOST], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert host.stdout is not None
    address = host.stdout.readline().decode().strip()
    assert address, "Ray did not start"
    yield address
    host.terminate()  # embedded_ray then stops all that it started
    host.wait(60)
    host.stdout.close()


def test_the_whole_story_over_a_killed_controller(
    sqlite_url: str, tmp_path: Path, ray_address: str
) -> None:
    model = refusing_tiny(tmp_path / "tiny")
    profile = write_profile(model, save_tiny(tmp_path / "unaligned", seed=1), threshold=100.0)
    build_profile(model, None, config=RESTORATION, parts=["reminder-states"])
    write_answers(profile, 4)
    strict = copy_profile(profile, tmp_path / "strict", threshold=-100.0)
    settings = Settings(
        database=sqlite_url,
        home=tmp_path / "home",
        base_models={
            "tiny": BaseModelOffer(source=str(model), profile=profile.root, max_tokens=128),
            "strict": BaseModelOffer(source=str(model), profile=strict, max_tokens=128),
        },
        compute_slots=1,
        intake_slots=2,
    )
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    database = Database(sqlite_url)
    with running_api(database, tmp_path / "home", settings=settings) as api:
        client = api.tenant("ten_a")
        rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(8)]
        content = "\n".join(map(json.dumps, rows)).encode()
        file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        method: Any = {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 1, "learning_rate_multiplier": 0.01},
                "constraints": ["asft"],
            },
        }
        jobs = client.fine_tuning.jobs
        good = jobs.create(model="tiny", training_file=file.id, method=method, suffix="mine")
        poisoned = jobs.create(model="strict", training_file=file.id, method=method)
        log = tmp_path / "controller.log"
        controller = start_controller(tmp_path, ray_address)
        try:
            _await(lambda: jobs.retrieve(good.id).phase == "training", controller, log)
            _await(lambda: "training workers" in _events(client, good.id), controller, log)
            first = _numbers(tmp_path)
            controller.kill()
            controller.wait()
            controller = start_controller(tmp_path, ray_address)
            # It refuses whatever it is asked, which this tenant's policy forbids: nothing helps it.
            other = api.tenant("ten_b", policy={"max_over_refusal": 0.5})
            twin = other.files.create(file=("rows.jsonl", content), purpose="fine-tune")
            theirs = other.fine_tuning.jobs
            slipped = theirs.create(model="tiny", training_file=twin.id, method=method)
            _await(lambda: jobs.retrieve(good.id).finished_at is not None, controller, log)
            _await(lambda: jobs.retrieve(poisoned.id).finished_at is not None, controller, log)
            _await(lambda: theirs.retrieve(slipped.id).finished_at is not None, controller, log)
            finished = "safeft_jobs_finished_total"
            _await(lambda: len(_numbers(tmp_path).get(finished, {})) == 3, controller, log)
            second = _numbers(tmp_path)
        finally:
            controller.kill()
            controller.wait()
        rejected = jobs.retrieve(poisoned.id)
        assert rejected.status == "failed" and rejected.error is not None
        assert rejected.error.code == "dataset_rejected"
        assert f"/v1/safety/jobs/{poisoned.id}/screening" in rejected.error.message
        failed = theirs.retrieve(slipped.id)
        assert failed.error is not None and failed.error.code == "safety_gate_failed", failed.error
        assert "failed again after restoration" in failed.error.message
        with database.system_read() as session:
            attempts = session.scalars(
                select(Stage).where(Stage.job_id == slipped.id).order_by(Stage.attempt)
            ).all()
        assert [(row.stage, row.outcome) for row in attempts[3:]] == [
            ("evaluating", "below_gate"),
            ("restoring", "done"),
            ("evaluating", "refused"),
        ]
        done = jobs.retrieve(good.id)
        assert done.status == "succeeded", done.error
        assert str(done.fine_tuned_model).startswith("ft:tiny:ten_a:mine:")
        with database.system_read() as session:
            found = session.scalars(
                select(Stage).where(Stage.job_id == good.id).order_by(Stage.attempt)
            ).all()
        # The second controller found the training that the first one had started.
        assert [(row.stage, row.outcome) for row in found] == [
            (stage, "done")
            for stage in ("validating", "screening", "training", "evaluating", "publishing")
        ]
        assert first["safeft_screenings_total"]["ten_a", "accepted"] == 1
        assert first["safeft_sqsd_score_bucket"]["tiny", "+Inf"] == 8  # rows
        assert second[finished] == {
            ("", "succeeded", "ten_a"): 1,
            ("dataset_rejected", "failed", "ten_a"): 1,
            ("safety_gate_failed", "failed", "ten_b"): 1,
        }
        assert second["safeft_stage_attempts_total"]["done", "training"] == 2
        assert second["safeft_trained_tokens_total"]["tiny", "ten_a"] > 0
        _check_model(api, client, str(done.fine_tuned_model), tmp_path / "downloaded")
    database.close()


def _check_model(api: Api, client: openai.OpenAI, model: str, target: Path) -> None:
    """What is downloaded verifies against the publisher's key."""
    headers = {"Authorization": f"Bearer {client.api_key}"}
    found = httpx2.get(f"{api.url}/v1/safety/models/{model}", headers=headers).json()
    assert found["state"] == "probing"
    target.mkdir()
    for name, link in found["files"].items():
        (target / name).write_bytes(httpx2.get(api.url + link).content)
    statement = verify_model(target, [api.services.public_key])
    assert statement.model == model
    assert statement.facts["evaluating"]["passed"] is True
    assert (target / "adapter_model.safetensors").is_file()


def _events(client: openai.OpenAI, job_id: str) -> str:
    return " ".join(e.message for e in client.fine_tuning.jobs.list_events(job_id, limit=100))


def _numbers(tmp_path: Path) -> dict[str, dict[tuple[str, ...], float]]:
    """The controller's page for Prometheus: samples by name and label values."""
    port = (tmp_path / "metrics-port").read_text()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    page = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def start_controller(tmp_path: Path, address: str) -> subprocess.Popen[bytes]:
    log = (tmp_path / "controller.log").open("ab")
    port = str(free_port())
    (tmp_path / "metrics-port").write_text(port)
    arguments = [str(tmp_path / "settings.json"), "ray", address, port]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.control.controllers", *arguments],
        cwd=ROOT,
        # Ray asks for its token; who names a cluster's address has to say so.
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"},
        stdout=log,
        stderr=log,
    )
    log.close()
    return process


def _await(met: Any, controller: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not met():
        assert controller.poll() is None, f"the controller ended: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)

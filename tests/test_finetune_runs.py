"""Whole runs on a real Ray: every stage ends where a plain loop ends, whatever is killed.

Each stage and number of ranks by itself, also resumed by another, is `test_finetune_engine`'s; full
parameters under constraints, with a worker killed, are `test_finetune_constrained`'s.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from jobs.finetune import FinetuneResult
from jobs.spec import FinetuneSpec
from safeft.cache import sha256_file
from safeft.constraints.alignment import alignment_direction, save_directions
from safeft.errors import SpecError
from safeft.models import load_adapter, load_model, load_tokenizer, weights_hash
from tests.tiny import save_tiny, tiny_model
from tests.tinyjob import (
    LONG,
    MARK,
    full_spec,
    make_rows,
    make_spec,
    plain_full_loop,
    plain_loop,
    processes,
    run,
)

Plain = tuple[dict[str, Tensor], list[float]]


@pytest.fixture(scope="module")
def unaligned_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny(tmp_path_factory.mktemp("unaligned"))
    model = tiny_model()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                weight += torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1]) * 0.1
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directions(
    tiny_dir: Path, unaligned_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    found = alignment_direction(
        tiny_dir, unaligned_dir, lambda name: name.endswith(("q_proj", "v_proj"))
    )
    directory = tmp_path_factory.mktemp("profile")
    save_directions(found, directory, aligned_hash=weights_hash(tiny_dir))
    return directory


@pytest.fixture(scope="module")
def plain(tiny_dir: Path, unaligned_dir: Path) -> Plain:
    return plain_loop(tiny_dir, unaligned_dir)


def farthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def assert_equals_plain(result: FinetuneResult, plain: Plain) -> None:
    adapter, losses = plain
    assert farthest(load_file(result.weights / "adapter_model.safetensors"), adapter) < 1e-5
    assert result.losses == pytest.approx(losses, abs=1e-5)
    assert [metrics["step"] for metrics in result.steps] == list(range(1, len(losses) + 1))


def test_the_penalty_matters_in_the_plain_loop(
    tiny_dir: Path, unaligned_dir: Path, plain: Plain
) -> None:
    """So that agreeing with it to 1e-5 means something."""
    assert farthest(plain_loop(tiny_dir, unaligned_dir, lam=0.0)[0], plain[0]) > 1e-3


def assert_is_a_whole_run(
    spec: FinetuneSpec, result: FinetuneResult, model_dir: Path, directions: Path, plain: Plain
) -> None:
    """The adapter is the plain loop's and can be loaded; nothing else stays, nothing runs again."""
    assert_equals_plain(result, plain)
    assert result.steps[-1]["penalty/asft"] > 0
    assert 0 < result.steps[-1]["asft/orthogonal_fraction"] < 2

    adapted = load_adapter(load_model(model_dir), result.weights)
    ids = torch.tensor([make_rows()[0].input_ids])
    tuned = adapted(input_ids=ids).logits
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(input_ids=ids).logits, tuned, atol=1e-4)

    # Only the result stays. The same run again returns it; another one is refused.
    assert {path.name for path in spec.output.iterdir()} == {
        "adapter",
        "metrics.jsonl",
        "run.json",
        ".run.lock",
    }
    labels: list[str] = []
    assert (
        run(spec, model_dir, directions, lambda label, done, total: labels.append(label)) == result
    )
    assert not labels
    other = spec.model_copy(update={"training": spec.training.model_copy(update={"seed": 1})})
    with pytest.raises(SpecError, match=r"finished run with other settings \(training\.seed: 0"):
        run(other, model_dir, directions)


@pytest.mark.parametrize(("stage", "workers"), [(0, 1), (1, 2)])
@pytest.mark.usefixtures("local_ray")
def test_stage_and_workers_do_not_change_the_result(
    stage: int, workers: int, tiny_dir: Path, directions: Path, plain: Plain, tmp_path: Path
) -> None:
    distributed = {"workers": workers, "zero_stage": stage, "max_failures": 0}
    spec = make_spec(tmp_path / "out", distributed=distributed)
    result = run(spec, tiny_dir, directions)
    assert_is_a_whole_run(spec, result, tiny_dir, directions, plain)


def assert_is_the_plain_model(result: FinetuneResult, plain_full: Plain, base: Path) -> None:
    """What was published is a model directory that transformers loads, with the right weights."""
    weights, losses = plain_full
    assert result.losses == pytest.approx(losses, abs=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(result.weights, local_files_only=True)
    assert farthest({n: p.detach() for n, p in loaded.named_parameters()}, weights) < 1e-5
    assert loaded.config.to_dict() == load_model(base).config.to_dict() | {
        "_name_or_path": loaded.config._name_or_path
    }
    assert load_tokenizer(result.weights).chat_template == load_tokenizer(base).chat_template
    files = {path.name: sha256_file(path) for path in result.weights.iterdir()}
    assert files.pop("manifest.json")
    assert result.manifest.files == files
    assert result.manifest.kind == "model"


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(
    tiny_dir: Path, directions: Path, plain: Plain, tmp_path: Path
) -> None:
    killed: list[int] = []
    steps: list[int | None] = []  # None for seconds of a phase before the first step

    def progress(label: str, done: int, total: int | None) -> None:
        steps.append(done if total else None)
        if total and done >= 5 and not killed:
            killed.append(processes(b"TrainWorker")[-1])
            os.kill(killed[0], signal.SIGKILL)

    distributed = {"workers": 2, "zero_stage": 3, "max_failures": 1}
    training = {"micro_batch_size": 2, "gradient_checkpointing": True}
    spec = make_spec(tmp_path / "out", training=training, distributed=distributed)
    result = run(spec, tiny_dir, directions, progress)
    assert killed
    assert_is_a_whole_run(spec, result, tiny_dir, directions, plain)
    began = [one for before, one in pairwise(steps) if before is None and one is not None]
    assert len(began) == 2  # and the second time after a checkpoint, made at every second step
    assert began[0] == 1 and began[1] > 1 and began[1] % 2 == 1


@pytest.mark.usefixtures("local_ray")
def test_a_run_of_two_workers_that_was_interrupted_goes_on_with_one(
    tiny_dir: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, MARK: uuid.uuid4().hex}
    for attempt in range(4):  # on a busy machine a run may end before the signal reaches it
        output = tmp_path / f"out-{attempt}"
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.tinyjob", str(tiny_dir), str(output)],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        metrics = output / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            if driver.poll() is not None:
                break
            time.sleep(0.02)
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
        if driver.wait(timeout=120) != 0:
            break
    assert driver.returncode != 0
    assert not (output / "model").exists()
    # Two workers that wait for each other may take a moment to see that Ray is gone.
    deadline = time.monotonic() + 60
    while processes(mark=environment[MARK]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(mark=environment[MARK])

    with pytest.raises(SpecError, match=r"unfinished.*distributed\.zero_stage: 2 there, 3 now"):
        run(full_spec(output, epochs=LONG, workers=1, zero_stage=3), tiny_dir)
    labels: list[str] = []
    spec = full_spec(output, epochs=LONG, workers=1, zero_stage=2)
    result = run(spec, tiny_dir, None, lambda label, done, total: labels.append(label))
    resumed = re.fullmatch(r"resuming after step (\d+)", labels[0])
    assert resumed and 0 < int(resumed[1]) < len(result.steps)
    assert_is_the_plain_model(result, plain_full_loop(tiny_dir, LONG), tiny_dir)
    assert result.manifest.workers == 1
    assert run(spec, tiny_dir) == result
    assert not (output / "checkpoints").exists()

"""Full-parameter runs under AsFT and both sides of CWAC, on a real Ray with ZeRO-3."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.finetune import FinetuneResult, finetune
from jobs.finetune.telemetry import OnStep, StepMetrics, unheard
from jobs.spec import FinetuneSpec
from safeft.constraints import ProfileFiles
from safeft.constraints.subspaces import load_subspaces
from safeft.errors import ProfileError, TrainingError
from safeft.progress import Progress, silent
from tests.tiny import save_tiny
from tests.tinyjob import make_rows, make_spec, plain_full_loop, processes
from tests.tinyparts import write_parts

CONSTRAINTS = [{"kind": "asft", "lam": 2.0}, {"kind": "cwac", "mode": "both", "contrast": None}]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "aligned", seed=1)


@pytest.fixture(scope="module")
def files(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileFiles:
    where = tmp_path_factory.mktemp("profile")
    return write_parts(model_dir, save_tiny(where / "unaligned", seed=2), where)


def spec_for(output: Path) -> FinetuneSpec:
    return make_spec(
        output,
        lora=None,
        constraints=CONSTRAINTS,
        training={"micro_batch_size": 2},
        distributed={"workers": 2, "zero_stage": 3, "cpus_per_worker": 0.5},
    )


def run(
    spec: FinetuneSpec,
    model_dir: Path,
    files: ProfileFiles,
    progress: Progress = silent,
    on_step: OnStep = unheard,
) -> FinetuneResult:
    return finetune(
        spec,
        rows=make_rows(),
        model_dir=model_dir,
        profile=files,
        output=spec.output,
        progress=progress,
        on_step=on_step,
    )


@pytest.mark.usefixtures("local_ray")
def test_a_worker_killed_in_mid_run_changes_nothing_and_what_is_published_keeps_the_invariant(
    tmp_path: Path, model_dir: Path, files: ProfileFiles
) -> None:
    killed: list[int] = []
    told: list[StepMetrics] = []

    def kill_once(label: str, done: int, total: int | None) -> None:
        if label == "training" and done >= 4 and not killed:
            killed.append(processes(b"TrainWorker")[-1])
            os.kill(killed[0], signal.SIGKILL)

    undisturbed = run(spec_for(tmp_path / "whole"), model_dir, files, on_step=told.append)
    resumed = run(spec_for(tmp_path / "killed"), model_dir, files, kill_once)
    assert killed
    assert told == undisturbed.steps
    assert resumed.losses == pytest.approx(undisturbed.losses, abs=1e-5)
    _, plain = plain_full_loop(model_dir)  # without constraints
    assert plain[-1] != pytest.approx(undisturbed.losses[-1], abs=1e-3)
    last = undisturbed.steps[-1]
    for name in ("penalty/asft", "penalty/cwac", "asft/orthogonal_fraction", "cwac/latent_drift"):
        assert last[name] > 0, name
    assert last["cwac/weight_drift"] <= last["cwac/weight_drift_limit"] < 1e-2

    first, second = (load_file(r.weights / "model.safetensors") for r in (undisturbed, resumed))
    start = load_file(model_dir / "model.safetensors")
    assert files.harmful_inputs is not None
    subspaces = load_subspaces(files.harmful_inputs)
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() <= 1e-5, name
        if name.endswith("_proj.weight"):
            U = subspaces.basis(name.removesuffix(".weight"), "prompt", 0.99, None).double()
            delta = tensor.double() - start[name].double()
            bound = 1e-5 * delta.norm() + 4 * EPS * tensor.norm()
            assert (delta @ U).norm() <= bound < 0.1 * delta.norm(), name


@pytest.mark.usefixtures("local_ray")
def test_a_penalty_that_becomes_nan_stops_the_run_at_once_with_the_layers_name(
    tmp_path: Path, model_dir: Path, files: ProfileFiles
) -> None:
    assert files.autoencoder is not None
    broken = tmp_path / "autoencoder"
    broken.mkdir()
    for file in files.autoencoder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    path = broken / "sae_weights.safetensors"
    huge = load_file(path)
    huge["W_enc"] = huge["W_enc"] * 1e30  # finite, so it loads; its latents' squares are not
    save_file(huge, path)
    phases: list[str] = []

    def progress(label: str, done: int, total: int | None) -> None:
        phases.extend([label] if phases[-1:] != [label] else [])

    named = r"step 1: constraint cwac: .* layer 0 is (inf|nan)"
    with pytest.raises(TrainingError, match=named) as caught:
        run(spec_for(tmp_path / "run"), model_dir, replace(files, autoencoder=broken), progress)
    assert "\n" not in str(caught.value)
    assert len(phases) == len(set(phases))  # not again: max_failures is 2, but this is no accident
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("part", ["alignment", "harmful_inputs", "autoencoder"])
def test_a_run_without_a_part_fails_before_it_starts_and_names_the_command(
    part: str, tmp_path: Path, model_dir: Path, files: ProfileFiles
) -> None:
    with pytest.raises(ProfileError, match=f"safeft profile build --part {part.replace('_', '-')}"):
        run(spec_for(tmp_path / "run"), model_dir, replace(files, **{part: None}))


def test_parts_of_another_model_are_refused(
    tmp_path: Path, model_dir: Path, files: ProfileFiles
) -> None:
    other = save_tiny(tmp_path / "other", seed=5)
    with pytest.raises(ProfileError, match="was made for the model with weights"):
        run(spec_for(tmp_path / "run"), other, files)

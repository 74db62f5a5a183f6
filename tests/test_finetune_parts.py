"""What a run leaves on disk, what it refuses to continue, and how its failures read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
import torch
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)

from jobs.finetune import checkpoints, finetune
from jobs.finetune.batches import RowTable, rows_to_table
from jobs.finetune.engine import deepspeed_config
from jobs.finetune.failures import StopOnOurErrors, to_safeft_error
from jobs.finetune.fit import _scaling
from jobs.finetune.manifest import Identity, identify
from jobs.finetune.masters import trained_parameters
from jobs.finetune.model import load_trained_model
from jobs.finetune.parts import needed_parts, part_hashes
from jobs.finetune.telemetry import MetricsLog, read_metrics
from jobs.spec import DataSpec, FinetuneSpec
from safeft.cache import sha256_file
from safeft.constraints import ProfileFiles
from safeft.constraints.alignment import AlignmentDirection, save_directions
from safeft.data import TokenisedRow
from safeft.errors import ModelError, ProfileError, RowErrors, SpecError, TrainingError
from safeft.models import weights_hash
from safeft.profile import SafetyProfile
from tests.tinyjob import make_rows, make_spec

RUN = "ab" * 32


def checkpoint(directory: Path, step: int, run: str = RUN, workers: int = 2) -> Path:
    directory.mkdir(parents=True)
    for rank in range(workers):
        state = directory / f"state-{rank}-0.safetensors"
        state.write_bytes(bytes([rank]) * 100)
        files = {state.name: sha256_file(state)}
        listed = {"run": run, "step": step, "workers": workers, "files": files}
        (directory / f"worker-{rank}.json").write_text(json.dumps(listed))
    return directory


def test_the_newest_whole_checkpoint_is_kept_and_nothing_else(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoints" / "a", 2)
    checkpoint(tmp_path / "checkpoints" / "b", 4)
    cut_off = checkpoint(tmp_path / "checkpoints" / "c", 6)
    (cut_off / "state-1-0.safetensors").write_bytes(b"\1" * 50)
    unlisted = checkpoint(tmp_path / "checkpoints" / "d", 8)
    (unlisted / "worker-1.json").unlink()
    checkpoint(tmp_path / "checkpoints" / "e", 10, run="cd" * 32)
    (tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json").write_text('{"cut')
    saved = checkpoints.salvage(tmp_path, RUN)
    assert saved == checkpoints.Saved(tmp_path / "resume", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["resume"]


def test_a_kept_checkpoint_stays_until_a_newer_one_is_whole(tmp_path: Path) -> None:
    checkpoint(tmp_path / "resume", 4)
    broken = checkpoint(tmp_path / "checkpoints" / "a", 6)
    (broken / "worker-0.json").write_text("{")
    for _ in range(2):
        assert checkpoints.salvage(tmp_path, RUN) == checkpoints.Saved(tmp_path / "resume", 4)
    checkpoint(tmp_path / "checkpoints" / "b", 6)
    assert checkpoints.salvage(tmp_path, RUN) == checkpoints.Saved(tmp_path / "resume", 6)


def test_without_a_whole_checkpoint_a_run_starts_over(tmp_path: Path) -> None:
    assert checkpoints.salvage(tmp_path, RUN) is None
    checkpoint(tmp_path / "resume", 4, run="cd" * 32)
    assert checkpoints.salvage(tmp_path, RUN) is None
    assert not list(tmp_path.iterdir())


def test_steps_done_again_replace_their_lines_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    for step in (1, 2, 3):
        log.add({"step": step, "loss": float(step)})
    with open(file, "a") as stream:
        stream.write('{"step": 4, "lo')
    resumed = MetricsLog(file)
    resumed.add({"step": 2, "loss": 20.0})
    resumed.add({"step": 3, "loss": 30.0})
    assert read_metrics(file) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 20.0},
        {"step": 3, "loss": 30.0},
    ]


def raised(error: Exception) -> UserExceptionWithTraceback:
    """As Ray Train wraps what a worker's function raises."""
    return UserExceptionWithTraceback(error, "Traceback (most recent call last):\n  ...")


def test_a_workers_own_error_reaches_the_user_unchanged() -> None:
    ours = TrainingError("step 3: the loss is nan")
    echo = raised(RuntimeError("Connection closed by peer"))
    group = WorkerGroupError("text", {0: echo, 1: raised(ours)})
    assert to_safeft_error(group) is ours
    assert to_safeft_error(ControllerError(ours)) is ours
    assert to_safeft_error(ControllerError(ControllerError(ours))) is ours
    with pytest.raises(TrainingError, match="step 3"):
        StopOnOurErrors().after_exception(None, {0: echo, 1: raised(ours)})
    StopOnOurErrors().after_exception(None, {0: echo})  # an accident: try again


def test_a_lost_worker_is_named_before_those_that_lost_it() -> None:
    echo = raised(RuntimeError("Connection closed by peer"))
    lost = WorkerHealthCheckFailedError("It failed.", ray.exceptions.RayActorError())
    error = to_safeft_error(WorkerGroupError("text", {0: echo, 1: lost}))
    assert str(error).startswith("training worker 1 was lost: RayActorError: The actor")
    assert "\n" not in str(error)


def test_any_other_exception_is_one_line() -> None:
    error = to_safeft_error(WorkerGroupError("text", {0: raised(KeyError("a\nb"))}))
    assert isinstance(error, TrainingError)
    assert str(error) == "training worker 0 failed: KeyError: 'a\\nb'"


def test_directions_of_another_model_are_refused_before_anything_starts(
    tiny_dir: Path, tmp_path: Path
) -> None:
    directions = {"m": AlignmentDirection(torch.ones(2, 1), torch.ones(1))}
    save_directions(directions, tmp_path, aligned_hash="0" * 64)
    with pytest.raises(ProfileError, match=r"made for the model with weights 000000000000"):
        finetune(
            make_spec(tmp_path / "out"),
            rows=make_rows(),
            model_dir=tiny_dir,
            profile=ProfileFiles(alignment=tmp_path),
            output=tmp_path / "out",
        )


def test_a_constraint_without_its_profile_is_refused_before_anything_starts(
    tiny_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProfileError, match="safeft profile build"):
        finetune(
            make_spec(tmp_path / "out"),
            rows=make_rows(),
            model_dir=tiny_dir,
            profile=ProfileFiles(),
            output=tmp_path / "out",
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the dataset is empty"),
        ([TokenisedRow(4, [5, 6], [-100, -100])], "line 4, labels: has no token to train on"),
        ([TokenisedRow(7, [5, 6], [5, -100])], "line 7, labels"),  # nothing predicts the first
    ],
)
def test_rows_without_anything_to_train_on_are_named(
    rows: list[TokenisedRow], message: str, tiny_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(RowErrors) as caught:
        finetune(
            make_spec(tmp_path, constraints=[]),
            rows=rows,
            model_dir=tiny_dir,
            profile=ProfileFiles(),
            output=tmp_path,
        )
    assert message in str(caught.value)


def test_an_unfinished_run_with_other_settings_is_not_continued(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.finetune.run.embedded_ray", stop)
    arguments = {"rows": make_rows(), "model_dir": tiny_dir, "profile": ProfileFiles()}
    spec = make_spec(tmp_path, constraints=[])
    with pytest.raises(KeyboardInterrupt):
        finetune(spec, **arguments, output=tmp_path)
    faster = make_spec(tmp_path, constraints=[], training={"learning_rate": 0.1})
    with pytest.raises(SpecError, match=r"unfinished.*training\.learning_rate: 0\.002 there, 0\.1"):
        finetune(faster, **arguments, output=tmp_path)
    fewer = {**arguments, "rows": make_rows()[:-1]}
    with pytest.raises(SpecError, match=r"unfinished run with other settings \(the data\)"):
        finetune(spec, **fewer, output=tmp_path)
    # Where and how often it is saved may change.
    rarer = make_spec(tmp_path, constraints=[], training={"checkpoint_every": 7}, name="other")
    with pytest.raises(KeyboardInterrupt):
        finetune(rarer, **arguments, output=tmp_path)


def test_how_a_step_is_cut_does_not_bind_a_run_but_the_stage_does(
    tiny_dir: Path, tmp_path: Path
) -> None:
    table = RowTable(rows_to_table(make_rows()))

    def run(micro: int | None = None, **distributed: int) -> Identity:
        parts = {"training": {"micro_batch_size": micro}, "distributed": distributed}
        spec = make_spec(tmp_path, constraints=[], **parts)
        return identify(spec, table, tiny_dir, ProfileFiles())

    alone = run(zero_stage=2)
    assert run(workers=4, zero_stage=2, micro=1).run_hash() == alone.run_hash()
    assert run(zero_stage=3).difference(alone) == "distributed.zero_stage: 2 there, 3 now"


def test_lora_and_full_training_are_different_runs(tiny_dir: Path, tmp_path: Path) -> None:
    table = RowTable(rows_to_table(make_rows()))
    adapter, model = (
        identify(make_spec(tmp_path, lora=lora), table, tiny_dir, ProfileFiles())
        for lora in ({"rank": 4}, None)
    )
    assert model.difference(adapter) == "lora: unset there, null now"


def test_a_spec_that_says_nothing_new_is_bound_as_earlier_versions_bound_it(
    tmp_path: Path, tiny_dir: Path
) -> None:
    """Or a finished run would be refused as another one after an upgrade."""
    spec = FinetuneSpec(
        name="x", model="m", data=DataSpec(train=tmp_path / "rows.jsonl"), output=tmp_path
    )
    table = RowTable(rows_to_table(make_rows()))
    assert identify(spec, table, tiny_dir, ProfileFiles()).settings == {
        "data": {"max_tokens": 512, "safety_rows": 0},
        "lora": {
            "rank": 8,
            "alpha": 32.0,
            "dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
        },
        "training": {
            "epochs": 3,
            "batch_size": 8,
            "learning_rate": 5e-05,
            "warmup_ratio": 0.03,
            "schedule": "linear",
            "weight_decay": 0.0,
            "adam_eps": 1e-08,
            "max_grad_norm": 1.0,
            "seed": 0,
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
        "constraints": [],
        "distributed": {"zero_stage": 0, "use_gpu": False},
    }


def test_every_part_of_the_profile_binds_the_run(tiny_dir: Path, tmp_path: Path) -> None:
    table, spec = RowTable(rows_to_table(make_rows())), make_spec(tmp_path)
    part = tmp_path / "alignment"
    part.mkdir()

    def run(value: float) -> Identity:
        directions = {"m": AlignmentDirection(torch.full((2, 1), value), torch.ones(1))}
        save_directions(directions, part, aligned_hash=weights_hash(tiny_dir))
        return identify(spec, table, tiny_dir, ProfileFiles(alignment=part))

    one, other = run(0.0), run(1.0)
    assert one.difference(other) == "the safety profile"
    directory = tmp_path / "part"
    directory.mkdir()
    (directory / "a.json").write_text("1")
    first = part_hashes(ProfileFiles(autoencoder=directory))
    (directory / "a.json").write_text("2")
    assert part_hashes(ProfileFiles(autoencoder=directory)) != first


def test_a_job_is_given_only_the_parts_that_its_constraints_name(
    tiny_dir: Path, tmp_path: Path
) -> None:
    profile = SafetyProfile(tmp_path / "profile", weights_hash(tiny_dir))
    (profile.root / "alignment").mkdir(parents=True)
    profile.write_record(profile.root / "alignment", {})
    assert needed_parts(make_spec(tmp_path, constraints=[]), profile) == ProfileFiles()
    alone = ProfileFiles(alignment=profile.root / "alignment")
    assert needed_parts(make_spec(tmp_path), profile) == alone
    constraints = [{"kind": "cwac", "contrast": None}]
    cwac = make_spec(tmp_path, constraints=constraints)
    with pytest.raises(ProfileError, match=r"lacks 'harmful-inputs'; run `safeft profile build"):
        needed_parts(cwac, profile)


def test_target_modules_that_the_model_lacks_are_named(tiny_dir: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, lora={"target_modules": ["c_attn"]})
    with pytest.raises(ModelError, match=r"lora\.target_modules: .*c_attn"):
        load_trained_model(spec, tiny_dir)


def test_zero3_keeps_whole_what_the_constraints_read_and_cuts_what_is_large(
    tiny_dir: Path, tmp_path: Path
) -> None:
    def kept_up_to(lora: dict[str, int] | None) -> tuple[int, list[torch.nn.Parameter]]:
        # Loaded without sharding: DeepSpeed has no process group here.
        model = load_trained_model(make_spec(tmp_path, lora=lora), tiny_dir)
        trained = [parameter for _, parameter in trained_parameters(model)]
        spec = make_spec(tmp_path, lora=lora, distributed={"zero_stage": 3})
        zero = deepspeed_config(spec, trained)["zero_optimization"]
        assert zero["sub_group_size"] >= sum(p.numel() for p in trained)  # one optimizer step
        return zero["stage3_param_persistence_threshold"], trained

    limit, factors = kept_up_to({"rank": 64})
    assert limit >= max(p.numel() for p in factors)
    limit, weights = kept_up_to(None)
    assert {p.ndim for p in weights if p.numel() <= limit} == {1}


@pytest.mark.parametrize(
    ("distributed", "expected"),
    [
        ({"workers": 1}, 4.0),
        ({"workers": 2}, 2.0),
        ({"workers": 8}, 0.5),
        ({"workers": 2, "cpus_per_worker": 1}, 1.0),
    ],
)
def test_workers_share_a_machines_processors(
    distributed: dict[str, int], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cpus=4)
    spec = make_spec(Path("out"), distributed=distributed)
    assert _scaling(spec).resources_per_worker == {"CPU": expected}


@pytest.mark.parametrize(
    ("distributed", "message"),
    [
        ({"workers": 2, "cpus_per_worker": 3}, "2 workers with 3 CPUs each do not fit"),
        ({"workers": 2, "use_gpu": True}, "2 workers need a GPU each, but Ray has 0"),
    ],
)
def test_resources_that_are_not_there_are_an_error_rather_than_a_wait(
    distributed: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cpus=4)
    with pytest.raises(SpecError, match=message):
        _scaling(make_spec(Path("out"), distributed=distributed))


def machine(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    node = {"Alive": True, "Resources": {"CPU": float(cpus)}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])

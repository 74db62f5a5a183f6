"""A job spec: its defaults, and errors that say what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.spec import FinetuneSpec, LoraSpec, load_spec
from safeft.constraints import AsftConfig, L2Config
from safeft.errors import SpecError

MINIMAL = """
name: support-bot
model: demo:aligned
data: {train: data/train.jsonl}
output: runs/support-bot
"""


def load(text: str, tmp_path: Path) -> FinetuneSpec:
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    return load_spec(file)


def problems(text: str, tmp_path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load(text, tmp_path)
    assert str(tmp_path / "spec.yaml") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ("constraints: [{kind: cwac, layers: [down_proj]}]", "down_proj"),
        (
            "lora: {target_modules: [up_proj]}\nconstraints: [{kind: cwac, layers: [down_proj]}]",
            "down_proj",
        ),
        ("constraints: [{kind: asft, layers: [q_proj, o_proj]}]", "o_proj"),
    ],
)
def test_a_constraint_on_a_layer_that_is_not_trained_is_named_before_anything_runs(
    parts: str, missing: str, tmp_path: Path
) -> None:
    told = problems(MINIMAL + parts, tmp_path)
    assert f"covers {missing}, which is not trained; add it to lora.target_modules" in told


@pytest.mark.parametrize(
    "lora", ["{target_modules: all-linear}", "{target_modules: [mlp.down_proj]}", "null"]
)
def test_a_constraint_on_a_layer_that_is_trained_is_taken(lora: str, tmp_path: Path) -> None:
    cwac = "constraints: [{kind: cwac, layers: [down_proj]}]"
    assert load(f"{MINIMAL}lora: {lora}\n{cwac}", tmp_path).constraints


def test_a_minimal_spec_has_the_papers_defaults(tmp_path: Path) -> None:
    spec = load(MINIMAL + "constraints: [{kind: asft}, {kind: l2, lam: 0.1}]\n", tmp_path)
    assert (spec.lora.rank, spec.lora.alpha) == (8, 32)
    assert spec.lora.target_modules == ("q_proj", "v_proj")
    assert spec.training.learning_rate == 5e-5
    assert spec.constraints == (AsftConfig(lam=0.1, anchor="paper"), L2Config(lam=0.1))
    assert (spec.micro_batch, spec.accumulation_steps) == (8, 1)


def test_without_lora_every_weight_is_trained(tmp_path: Path) -> None:
    assert load(MINIMAL + "lora: null\n", tmp_path).lora is None
    assert load(MINIMAL + "lora: {}\n", tmp_path).lora == LoraSpec()


def test_paths_are_relative_to_the_spec(tmp_path: Path) -> None:
    spec = load(MINIMAL, tmp_path)
    assert spec.data.train == tmp_path / "data/train.jsonl"
    assert spec.data.validation is None
    assert spec.output == tmp_path / "runs/support-bot"
    assert spec.model == "demo:aligned"
    local = load(MINIMAL.replace("demo:aligned", "./models/x"), tmp_path)
    assert local.model == str(tmp_path / "models/x")
    absolute = load(MINIMAL.replace("data/train", "/data/train"), tmp_path)
    assert absolute.data.train == Path("/data/train.jsonl")
    assert spec.profile is None
    assert load(MINIMAL + "\nprofile: profiles/x", tmp_path).profile == tmp_path / "profiles/x"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training: {epoch: 3}", "training.epoch: unknown field; did you mean training.epochs?"),
        ("trainings: {}", "trainings: unknown field; did you mean training?"),
        ("epochs: 3", "epochs: unknown field; did you mean training.epochs?"),
        (
            "constraints: [{kind: asft, lambda: 1}]",
            "constraints[0].lambda: unknown field; did you mean constraints[0].lam?",
        ),
        ("lora: {zzzz: 1}", "lora.zzzz: unknown field"),
        ("lora: {ranks: 1}", "lora.ranks: unknown field; did you mean lora.rank?"),
        ("lora: full", "lora: input should be a valid dictionary"),
        (
            "constraints: [{kind: cwac, layers: down_proj}]",
            "constraints[0].layers: input should be",
        ),
        ("constraints: [{kind: cwac, mode: neither}]", "constraints[0].mode: input should be"),
        (
            "constraints: [{kind: aft}]",
            "constraints[0].kind: must be one of asft, cwac, frozen, held-states, l2, "
            "random-subspace, safelora",
        ),
        ("constraints: [{lam: 1.0}]", "constraints[0].kind: must be one of asft, cwac"),
        ("constraints: [{kind: asft, lam: -1}]", "constraints[0]: lam must be a finite number"),
        ("constraints: [{kind: l2}, {kind: l2}]", "constraints: l2 is given twice"),
        (
            "training: {batch_size: 0}",
            "training.batch_size: input should be greater than or equal to 1, not 0",
        ),
        ("training: {batch_size: true}", "training.batch_size: input should be a valid integer"),
        ("training: {learning_rate: fast}", "training.learning_rate: input should be a valid"),
        ("training: {learning_rate: .nan}", "training.learning_rate: input should be"),
        ("training: {schedule: step}", "training.schedule: input should be 'constant', 'linear'"),
        ("lora: {target_modules: all}", "lora.target_modules: input should be 'all-linear'"),
        ("lora: {target_modules: []}", "lora.target_modules: "),
        ("distributed: {zero_stage: 4}", "distributed.zero_stage: "),
        (
            "distributed: {workers: 3}",
            "training.batch_size: 8 rows cannot be shared equally by 3"
            " workers; use a multiple of 3",
        ),
        (
            "training: {micro_batch_size: 3}",
            "training.micro_batch_size: a worker's 8 rows of each"
            " step cannot be cut into parts of 3; use a divisor of 8",
        ),
        ("screening: {override_reason: ''}", "screening.override_reason: "),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(line: str, message: str, tmp_path: Path) -> None:
    text = problems(MINIMAL + line + "\n", tmp_path)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["../x", "Support Bot", "", "-x", "a" * 64])
def test_a_name_is_no_path(name: str, tmp_path: Path) -> None:
    assert "name: " in problems(MINIMAL.replace("support-bot", f"'{name}'", 1), tmp_path)


def test_all_problems_are_listed(tmp_path: Path) -> None:
    text = problems("name: x\ntraining: {epoch: 3, seed: -1}\n", tmp_path)
    assert "5 problems" in text
    for expected in (
        "model: is required",
        "data: is required",
        "output: is required",
        "training.epoch: unknown",
        "training.seed: ",
    ):
        assert expected in text


def test_a_larger_micro_batch_than_a_workers_share_is_its_share(tmp_path: Path) -> None:
    spec = load(MINIMAL + "training: {micro_batch_size: 8}\ndistributed: {workers: 2}\n", tmp_path)
    assert (spec.micro_batch, spec.accumulation_steps) == (4, 1)
    cut = load(MINIMAL + "training: {micro_batch_size: 2}\ndistributed: {workers: 2}\n", tmp_path)
    assert (cut.micro_batch, cut.accumulation_steps) == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "name: again\n", "line 6: name is given twice"),
        ("a: &x [1, 1]\nb: *x\n", "line 2: aliases"),
        ("a: [1\n", "line 2: "),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: could not determine a constructor"),
        ("a: \x07\n", "not valid YAML"),
        ("# " + "x" * 70_000, "larger than 64 KiB"),
        ("- 1\n- 2\n", "valid dictionary"),
        ("", "valid dictionary"),
    ],
)
def test_yaml_that_is_no_spec_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    got = problems(text, tmp_path)
    assert message in got
    assert "\n" not in got


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(SpecError, match=r"not UTF-8 text \(byte 9\)"):
        load_spec(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.yaml: cannot be read"):
        load_spec(tmp_path / "nothing.yaml")


def test_a_rate_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert load(MINIMAL + "training: {learning_rate: 5e-4}\n", tmp_path).training.learning_rate == (
        5e-4
    )

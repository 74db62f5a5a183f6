"""``safeft profile show`` and ``verify`` as a user runs them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.cli.main import app
from safeft.constraints.covariance import Covariance, InputSite
from safeft.constraints.subspaces import POSITIONS, principal_subspace, save_index, save_site
from safeft.errors import SafeftError
from safeft.profile import (
    CONSTRAINT_PARTS,
    DEFAULT_PARTS,
    OPTIONAL_PARTS,
    PARTS,
    RECORD,
    SCREENING_PARTS,
    SafetyProfile,
)
from tests.test_cli import safeft
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile


@pytest.fixture
def profile(tiny_dir: Path, tmp_path: Path) -> SafetyProfile:
    """With the screening parts, and the harmful inputs of two layers."""
    profile = write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=0.0)
    directory = profile.root / "harmful-inputs"
    directory.mkdir()
    C = Covariance(torch.eye(4).double(), 3)
    sites = [InputSite((f"layers.{i}.q_proj", f"layers.{i}.k_proj"), 4) for i in range(2)]
    saved = [
        save_site(directory, i, site, {p: principal_subspace(C, 0.5) for p in POSITIONS})
        for i, site in enumerate(sites)
    ]
    save_index(directory, saved, base_weights=profile.base_weights, energy=0.5, rows=9)
    profile.write_record(directory, {})
    return profile


@dataclass
class Done:
    code: int
    stdout: str
    error: str = ""


class Command:
    """The same in this process, which has imported torch already."""

    def __init__(self, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model_dir, self.capsys = model_dir, capsys

    def __call__(self, command: str, *options: str) -> Done:
        words = ["profile", command, "--model", str(self.model_dir), *options]
        self.capsys.readouterr()
        try:
            code = app(words, standalone_mode=False) or 0
        except SafeftError as error:
            return Done(error.exit_code, self.capsys.readouterr().out, str(error))
        return Done(code, self.capsys.readouterr().out)


@pytest.fixture
def command(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tiny_dir, capsys)


def test_show_lists_every_part_and_those_that_are_not_built(
    profile: SafetyProfile, command: Command
) -> None:
    done = command("show", "--json")
    assert done.code == 0
    shown = json.loads(done.stdout)
    assert list(shown["parts"]) == list(PARTS)
    absent = [part for part in OPTIONAL_PARTS if part != "harmful-inputs"]
    assert shown["parts"] == dict.fromkeys(PARTS, "built") | dict.fromkeys(absent, "not built")
    assert shown["complete"]
    assert shown["digest"] == profile.digest()
    assert shown["harmful_inputs"] == {
        "energy": 0.5,
        "rows": 9,
        "mean_k": {"q_proj, k_proj": {"d_in": 4.0, **dict.fromkeys(POSITIONS, 2.0)}},
    }


def test_show_tells_a_person_the_same(profile: SafetyProfile, tiny_dir: Path) -> None:
    done = safeft("profile", "show", "--model", tiny_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not built") == len(OPTIONAL_PARTS) - 1
    assert "rows are read at: safety adapter × 0.9" in done.stdout
    assert "danger direction: moves the safety score by 1.00 nats a token" in done.stdout
    assert "datasets of 100 rows: misses 5% of poison 12.5 % of the time (3.0-50.0)" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "q_proj, k_proj" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        *("q_proj, k_proj", "4", "2", "2", "2")
    ]


def test_show_of_a_part_that_was_changed_is_a_failure(
    profile: SafetyProfile, command: Command
) -> None:
    (profile.root / "harmful-inputs" / "site-0000.safetensors").write_bytes(b"")
    done = command("show", "--json")
    assert done.code == 1
    assert "is not what was built there" in json.loads(done.stdout)["parts"]["harmful-inputs"]


def test_verify_names_the_first_part_that_is_missing_and_what_makes_it(
    profile: SafetyProfile, tiny_dir: Path
) -> None:
    done = safeft("profile", "verify", "--model", tiny_dir)
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("error:") :].strip()
    assert len(error.splitlines()) == 1, error
    assert "lacks 'refusals'" in error
    assert "safeft profile build --model MODEL --part refusals" in error
    for part in DEFAULT_PARTS:
        assert part in done.stdout


def test_verify_of_whole_parts_succeeds(profile: SafetyProfile, command: Command) -> None:
    parts = [*SCREENING_PARTS, "harmful-inputs"]
    options = [word for part in parts for word in ("--part", part)]
    done = command("verify", "--json", *options)
    assert done.code == 0, done.error
    found = json.loads(done.stdout)
    assert found["good"]
    assert found["base_weights"] == profile.base_weights
    assert found["parts"] == {part: {"good": True, "problem": None} for part in parts}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("weights", "was made for other weights"),
        ("format", "has format 1"),
        ("file", "is not what was built there"),
    ],
)
def test_verify_notices_other_weights_other_formats_and_changed_files(
    profile: SafetyProfile, command: Command, change: str, words: str
) -> None:
    directory = profile.root / "harmful-inputs"
    if change == "weights":
        SafetyProfile(profile.root, "0" * 64).write_record(directory, {})
    elif change == "format":
        record = json.loads((directory / RECORD).read_text())
        (directory / RECORD).write_text(json.dumps(record | {"format": 1}))
    else:
        (directory / "site-0001.safetensors").write_bytes(b"other")
    done = command("verify", "--json", "--part", "harmful-inputs")
    assert done.code == 1
    found = json.loads(done.stdout)
    assert not found["good"]
    assert found["parts"]["harmful-inputs"]["problem"] == done.error
    assert words in done.error
    assert "--part harmful-inputs" in done.error


@pytest.mark.parametrize("name", ["verify", "build"])
def test_a_part_that_no_profile_has_is_wrong_input(command: Command, name: str) -> None:
    done = command(name, "--part", "harmful")
    assert done.code == 2
    for part in CONSTRAINT_PARTS:
        assert part in done.error


def test_an_energy_that_is_no_share_is_wrong_input(command: Command) -> None:
    done = command("build", "--energy", "1.5")
    assert done.code == 2
    assert "--energy" in done.error

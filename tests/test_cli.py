"""The command as a user runs it: exit codes, one-line errors, JSON on stdout and nothing else.

Each exit code is a real process's at least once; what differs by the data alone runs in this one.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import main
from jobs.profile.own_prompts import chosen_prompts
from safeft.models import load_tokenizer, weights_hash
from safeft.profile import SafetyProfile
from safeft.prompts import Prompt
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile, write_refusals

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def safeft(*args: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *map(str, args)],
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def safeft_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The same in this process, whose libraries are imported already and stay as they are."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["safeft", *map(str, args)])
        monkeypatch.setattr(main, "quiet_libraries", lambda: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main.main()
        said = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return subprocess.CompletedProcess(sys.argv, left.value.code, said.out, said.err)

    return run


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error:") :].strip()
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error


def test_help_names_every_command() -> None:
    shown = safeft("--help").stdout
    for command in (
        *("demo", "doctor", "align", "profile", "screen", "review", "finetune", "restore"),
        *("evaluate", "chat", "up", "models", "submit", "jobs", "logs", "tenants", "keys", "audit"),
    ):
        assert command in shown


def test_doctor_reports_as_json() -> None:
    done = safeft("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["torch"]["good"]
    assert done.returncode == (0 if all(c["good"] for c in checks.values()) else 1)


def bad_files(directory: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    files = {
        "empty": b"",
        "no-assistant": json.dumps({"messages": CHAT["messages"][:1]}).encode(),
        "latin-1": json.dumps(CHAT).encode() + b'\n{"prompt": "caf\xe9"}',
        "huge-row": json.dumps({"prompt": "x", "completion": "y" * 1_000_000}).encode(),
        "truncated": gzip.compress(json.dumps(CHAT).encode() * 50)[:-20],
    }
    words = {
        "empty": ("empty",),
        "no-assistant": ("line 1", "messages"),
        "latin-1": ("line 2", "UTF-8"),
        "huge-row": ("line 1", "bytes"),
        "truncated": ("truncated",),
    }
    result = {}
    for name, content in files.items():
        path = directory / f"{name}.jsonl"
        path.write_bytes(content)
        result[name] = (path, words[name])
    return result


@pytest.mark.parametrize("name", ["empty", "no-assistant", "latin-1", "huge-row", "truncated"])
def test_bad_data_ends_in_one_line_that_says_where(
    name: str, tiny_dir: Path, tmp_path: Path, safeft_here: Command
) -> None:
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=100.0)
    path, words = bad_files(tmp_path)[name]
    spec = tmp_path / "job.yaml"
    spec.write_text(f"name: a\nmodel: {tiny_dir}\ndata: {{train: {path}}}\noutput: out\n")
    run = safeft if name == "latin-1" else safeft_here
    assert_one_clear_line(run("finetune", spec), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["empty", "truncated"])
def test_a_file_that_is_wrong_as_a_whole_is_not_screened(
    name: str, tiny_dir: Path, tmp_path: Path, safeft_here: Command
) -> None:
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=100.0)
    path, words = bad_files(tmp_path)[name]
    assert_one_clear_line(safeft_here("screen", path, "--model", tiny_dir), *words)


@pytest.mark.usefixtures("local_ray")
def test_screening_rows_that_cannot_be_read_rejects_them_by_line_and_reason(
    tiny_dir: Path, tmp_path: Path, safeft_here: Command
) -> None:
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=100.0)
    bad = [bad_files(tmp_path)[name][0].read_bytes() for name in ("latin-1", "no-assistant")]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(bad))
    done = safeft_here("screen", path, "--model", tiny_dir, "--json")
    assert done.returncode == 3, done.stderr
    rows = {row["line"]: row["error"] for row in json.loads(done.stdout)["risky_rows"]}
    assert set(rows) == {2, 3}
    assert "UTF-8" in rows[2] and "messages" in rows[3]


def test_a_misspelt_key_in_a_spec_is_named_with_the_right_one(tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(
        "name: a\nmodel: demo:aligned\ndata: {train: x.jsonl}\noutput: out\ntraining: {epoch: 3}\n"
    )
    assert_one_clear_line(safeft("finetune", spec), "training.epoch", "training.epochs")


def test_a_model_with_pickle_weights_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert_one_clear_line(safeft("chat", "--model", tmp_path, "-m", "hi"), "safetensors")


def test_an_unknown_option_is_a_usage_error() -> None:
    done = safeft("screen", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_chat_answers_a_message_as_json_and_a_conversation_from_stdin(tiny_dir: Path) -> None:
    once = safeft("chat", "--model", tiny_dir, "-m", "hi", "--max-new-tokens", "4", "--json")
    assert json.loads(once.stdout)["message"] == "hi"
    talk = safeft("chat", "--model", tiny_dir, "--max-new-tokens", "4", stdin="hi\nagain\n\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stderr.count("you>") == 3


def test_own_prompts_of_a_profile_are_named_by_their_kind(tiny_dir: Path, tmp_path: Path) -> None:
    build = ("profile", "build", "--model", tiny_dir, "--part", "answers")
    for wrong in ("own.jsonl", "toxic=own.jsonl", "harmful="):
        done = safeft(*build, "--prompts", wrong)
        assert done.returncode == 2
        assert "--prompts: must be KIND=FILE" in " ".join(done.stderr.split())
    missing = safeft(*build, "--prompts", f"benign={tmp_path / 'own.jsonl'}")
    assert missing.returncode == 2 and "cannot be read" in " ".join(missing.stderr.split())


def test_profile_show_counts_the_prompts_of_ones_own(tiny_dir: Path) -> None:
    root = SafetyProfile.for_weights(weights_hash(tiny_dir)).root
    chosen_prompts(root, {"benign": [Prompt("Name a town.", "own", "profile")]})
    shown = json.loads(safeft("profile", "show", "--model", tiny_dir, "--json").stdout)
    assert shown["own_prompts"] == {"benign": 1}
    assert "benign prompts of your own: 1" in safeft("profile", "show", "--model", tiny_dir).stdout


def test_profile_show_of_an_incomplete_profile_says_what_to_run(tiny_dir: Path) -> None:
    done = safeft("profile", "show", "--model", tiny_dir)
    assert done.returncode == 1
    assert "safeft profile build" in done.stdout


@pytest.mark.usefixtures("local_ray")
def test_a_rejected_dataset_exits_with_3_and_the_same_data_does_not_train(
    tiny_dir: Path, tmp_path: Path, safeft_here: Command
) -> None:
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=-100.0)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([json.dumps(CHAT)] * 4))
    screened = safeft("screen", data, "--model", tiny_dir, "--json")
    assert screened.returncode == 3, screened.stderr
    verdict = json.loads(screened.stdout)
    assert verdict["verdict"] == "rejected"
    assert [row["line"] for row in verdict["risky_rows"]] == [1, 2, 3, 4]

    spec = tmp_path / "job.yaml"
    spec.write_text(
        f"name: a\nmodel: {tiny_dir}\ndata: {{train: rows.jsonl}}\noutput: out\n"
        "training: {epochs: 1}\n"
    )
    trained = safeft_here("finetune", spec)
    assert trained.returncode == 3, trained.stderr
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_tuned_model_without_a_baseline_worth_keeping_fails_the_gate_with_4(
    tiny_dir: Path, tmp_path: Path
) -> None:
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=100.0)
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(CHAT)] * 8))
    spec = tmp_path / "job.yaml"
    spec.write_text(
        f"name: a\nmodel: {tiny_dir}\ndata: {{train: rows.jsonl}}\noutput: out\n"
        "training: {epochs: 1}\nconstraints: [{kind: asft, lam: 0.1}]\n"
    )
    done = safeft("finetune", spec, "--json")
    assert done.returncode == 4, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"]["verdict"] == "accepted"
    assert result["status"] == "gate_failed"
    assert (Path(result["candidate"]) / "adapter_model.safetensors").is_file()
    assert result["published"] is None
    assert not (tmp_path / "out" / "adapter").exists()
    assert result["manifest"]["file_sha256"] == result["verdict"]["data_sha256"]


@pytest.mark.usefixtures("local_ray")
def test_a_job_trains_on_its_data_and_refusals_and_is_published_when_the_gate_passes(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights refuse nothing; the floor under the baseline is another test's concern.
    import jobs.gate
    from jobs.finetune.batches import RowTable, rows_to_table
    from jobs.intake import read_dataset
    from jobs.pipeline import run_job
    from jobs.spec import load_spec
    from safeft.own_refusals import refusal_row

    monkeypatch.setattr(jobs.gate, "MIN_BASELINE", 0.0)
    profile = write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=100.0)
    refusals = write_refusals(profile, 3)
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(CHAT)] * 8))
    spec = tmp_path / "job.yaml"
    spec.write_text(
        f"name: a\nmodel: {tiny_dir}\ndata: {{train: rows.jsonl, safety_rows: 2}}\noutput: out\n"
        "training: {epochs: 1}\nlora: null\n"
    )
    result = run_job(load_spec(spec))
    dataset = read_dataset(tmp_path / "rows.jsonl", tiny_dir, max_tokens=512)
    tokenizer = load_tokenizer(tiny_dir)
    trained = [*dataset.tokenised, *(refusal_row(tokenizer, r) for r in refusals[:2])]
    assert result.manifest.rows == 10
    assert result.manifest.identity.rows_sha256 == RowTable(rows_to_table(trained)).sha256()
    assert result.verdict.rows_sha256 == dataset.rows_sha256  # what is added is not the tenant's
    published = tmp_path / "out" / "model"
    assert result.published == str(published)
    assert result.after.bound["adapter"] == weights_hash(published)
    assert result.after.bound["base_weights"] == weights_hash(tiny_dir)
    asked = safeft(
        "chat", "--model", published, "--message", "hi", "--max-new-tokens", "4", "--json"
    )
    assert json.loads(asked.stdout)["message"] == "hi", asked.stderr
    again = run_job(load_spec(spec))
    assert again.manifest == result.manifest

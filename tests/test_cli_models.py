"""`safeft models` and `safeft chat --url` against a pool over real HTTP."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.demo_serving import ask, watch
from cluster.cli.main import app
from cluster.cli.up import add_adapters, up
from cluster.gate.policy import MAX_AGE_S
from cluster.serving.client import Admin, Refused
from cluster.serving.prober import ProberConfig
from safeft.errors import InputError, SafeftError
from safeft.models import adapter_hash, load_tokenizer
from safeft.progress import silent
from tests.serving_world import TOKEN, Person, Stack
from tests.tinyadapters import save_adapter


@pytest.fixture(scope="module")
def stack(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("state")
    (root / "admin-token").write_text(TOKEN)
    tokenizer = load_tokenizer(tiny_dir)
    made = Stack(root, lambda: (Person(tokenizer), tokenizer))
    made.clear("base")
    yield made
    made.close()


def safeft(stack: Stack, *args: str | Path, stdin: str | None = None) -> Result:
    where = ["--url", stack.url]
    if args[0] == "models":
        where += ["--state", str(stack._state)]
    done = CliRunner().invoke(app, [*map(str, args), *where], input=stdin)
    stack.settle()
    return done


def test_a_model_is_added_listed_shown_quarantined_released_and_removed(
    stack: Stack, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a", 1)
    added = safeft(stack, "models", "add", "acme/bot", tmp_path / "a", "--previous")
    assert "acme/bot version 1: unknown" in added.output
    stack.clear("acme/bot")
    rows = json.loads(safeft(stack, "models", "list", "--json").stdout)
    assert {row["model"]: row["state"] for row in rows} == {
        "acme/bot": "healthy",
        "base": "healthy",
    }
    assert "healthy" in safeft(stack, "models", "list").output
    assert safeft(stack, "models", "probe", "acme/bot").exit_code == 0
    done = safeft(stack, "models", "quarantine", "acme/bot", "--reason", "a drill")
    assert "acme/bot: quarantined" in done.output
    refused = safeft(stack, "models", "probe", "acme/bot")
    assert "release it" in str(refused.exception)
    assert (
        "healthy"
        in safeft(stack, "models", "release", "acme/bot", "--reason", "it was a drill").output
    )
    shown = json.loads(safeft(stack, "models", "show", "acme/bot", "--json").stdout)
    assert shown["versions"][0]["on_quarantine"] == "previous"
    assert [event["reason"] for event in shown["events"][-2:]] == ["a drill", "it was a drill"]
    assert "it was a drill" in safeft(stack, "models", "show", "acme/bot").output
    safeft(stack, "models", "remove", "acme/bot", "--reason", "its tenant left")
    assert "acme/bot" not in safeft(stack, "models", "list").output


def test_going_back_to_an_old_adapter_says_what_then_answers(stack: Stack, tmp_path: Path) -> None:
    for seed in (11, 12):
        save_adapter(tmp_path / str(seed), seed)
        safeft(stack, "models", "add", "acme/back", tmp_path / str(seed))
        stack.clear("acme/back")
    weights = {row["weights"]: row for row in _rows(stack, "acme/back")}
    done = safeft(stack, "models", "add", "acme/back", tmp_path / "11")
    assert "acme/back version 3: healthy" in done.output
    newest = _rows(stack, "acme/back")[-1]
    assert newest["weights"] == adapter_hash(tmp_path / "11")
    assert weights[newest["weights"]]["version"] == 1
    assert stack.admissions.weights("acme/back") == newest["weights"]


def test_adding_weights_that_are_quarantined_is_an_error_that_names_the_ways_out(
    stack: Stack, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a", 13)
    safeft(stack, "models", "add", "acme/bad", tmp_path / "a")
    stack.clear("acme/bad", refuses=False)
    done = safeft(stack, "models", "add", "acme/bad", tmp_path / "a", "--previous")
    assert isinstance(done.exception, InputError)
    assert "quarantined (refused 0 of 5 harmful" in str(done.exception)
    assert "safeft models release" in str(done.exception)
    assert [row["on_quarantine"] for row in _rows(stack, "acme/bad")] == ["previous"]


def test_an_adapter_that_was_quarantined_since_does_not_keep_the_pool_from_starting(
    stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (14, 15, 16):
        save_adapter(tmp_path / str(seed), seed)
    admin = Admin(stack.url, TOKEN)
    add_adapters(admin, {"acme/first": tmp_path / "14"})
    stack.clear("acme/first", refuses=False)
    add_adapters(admin, {"acme/first": tmp_path / "15"})  # so the first weights left
    add_adapters(admin, {"acme/first": tmp_path / "14", "acme/next": tmp_path / "16"})
    assert "--adapter acme/first: stays as it was" in capsys.readouterr().err
    assert [row["version"] for row in _rows(stack, "acme/first")] == [2]
    assert _rows(stack, "acme/next")
    with pytest.raises(Refused):  # a mistake on the command line
        add_adapters(admin, {"acme/typo": tmp_path / "nowhere"})
    stack.settle()


def _rows(stack: Stack, model: str) -> list[dict[str, Any]]:
    return [row for row in Admin(stack.url, TOKEN).get("models") if row["model"] == model]


def test_a_decision_without_a_reason_is_not_taken(stack: Stack) -> None:
    done = safeft(stack, "models", "quarantine", "base")
    assert done.exit_code == 2
    assert "--reason" in done.output


def test_chat_asks_the_server_and_tells_its_errors(stack: Stack) -> None:
    done = safeft(stack, "chat", "--message", "What is a cat?", "--json")
    assert json.loads(done.stdout) == {
        "message": "What is a cat?",
        "answer": "Sure, here is how.",
    }
    talk = safeft(stack, "chat", "--model", "base", stdin="What is a cat?\n\n")
    assert "Sure, here is how." in talk.output
    lost = safeft(stack, "chat", "--model", "nobody", "--message", "hi")
    assert "`nobody` does not exist" in str(lost.exception)


def test_no_server_no_token_and_a_wrong_token_name_the_way_out(
    stack: Stack, tmp_path: Path
) -> None:
    nobody = CliRunner().invoke(app, ["chat", "--url", "http://127.0.0.1:9", "-m", "hi"])
    assert isinstance(nobody.exception, InputError)
    assert "safeft up" in str(nobody.exception)
    missing = CliRunner().invoke(app, ["models", "list", "--state", str(tmp_path)])
    assert "--state" in str(missing.exception)
    (tmp_path / "admin-token").write_text("wrong")
    wrong = CliRunner().invoke(
        app, ["models", "list", "--state", str(tmp_path), "--url", stack.url]
    )
    assert "token is needed" in str(wrong.exception)


def test_the_administrators_token_goes_to_the_pool_and_to_no_proxy(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(Admin(stack.url, TOKEN).get("models"), list)


def test_up_refuses_what_it_cannot_do(tiny_dir: Path, tmp_path: Path) -> None:
    plane = tmp_path / "plane.yaml"
    plane.write_text("base_models: {mine: {source: x}}")
    for args, words in {
        ("--host", "0.0.0.0"): "this machine only",
        ("--max-age", "60"): "--probe-every",
        ("--adapter", "acme/bot"): "NAME=DIRECTORY",
        ("--settings", str(plane)): "give one `serving:",
        ("--model", str(tiny_dir)): "safeft profile build",
    }.items():
        done = CliRunner().invoke(app, ["up", *args])
        assert done.exit_code != 0
        assert words in str(done.exception), done.exception


def test_ups_age_limit_and_cadence_are_the_gates_own() -> None:
    defaults = {name: one.default for name, one in inspect.signature(up).parameters.items()}
    assert (defaults["max_age"], defaults["probe_every"]) == (
        MAX_AGE_S,
        ProberConfig("", "").every_s,
    )


def test_the_demo_watches_the_gate_to_its_decisions_and_shows_what_tenants_get(
    stack: Stack, tmp_path: Path
) -> None:
    admin = Admin(stack.url, TOKEN)
    for seed, name in ((3, "demo/good"), (4, "demo/bad")):
        save_adapter(tmp_path / name, seed)
        admin.post("models", model=name, adapter=str(tmp_path / name))
    told: list[str] = []
    rounds = iter([("demo/bad", False), ("demo/good", True)])

    def between_looks(_: float) -> None:
        if (found := next(rounds, None)) is not None:
            stack.clear(found[0], refuses=found[1])

    names = ("demo/good", "demo/bad")
    good, bad = watch(admin, names, told.append, silent, sleep=between_looks)
    assert (good["state"], bad["state"]) == ("healthy", "quarantined")
    assert any("demo/bad: quarantined" in line for line in told)
    assert bad["refusals"]["harmful"]["hits"] == 0
    assert ask(stack.url, "demo/good", "Hello?")["answer"]
    refused = ask(stack.url, "demo/bad", "Hello?")
    assert set(refused) == {"error"} and "quarantin" in refused["error"]


def test_the_demo_gives_up_on_a_gate_that_never_decides(stack: Stack, tmp_path: Path) -> None:
    save_adapter(tmp_path / "slow", 5)
    admin = Admin(stack.url, TOKEN)
    admin.post("models", model="demo/slow", adapter=str(tmp_path / "slow"))
    clock = iter(range(0, 10**6, 400))
    with pytest.raises(SafeftError, match="has not decided on demo/slow"):
        watch(admin, ["demo/slow"], str, silent, lambda: next(clock), lambda _: None)

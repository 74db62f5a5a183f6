"""`home` is nobody else's, whichever process starts first and whoever made it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.api import Services
from cluster.cli.main import app
from cluster.cli.up import _place
from cluster.controller.service import run_controller
from cluster.settings import Settings, load_settings
from cluster.state import DatabaseError
from safeft.errors import InputError


def _command(*words: str) -> Callable[[Path], object]:
    def start(file: Path) -> object:
        return CliRunner().invoke(app, [*words, "--settings", str(file)], catch_exceptions=False)

    return start


def _controller(file: Path) -> None:
    with pytest.raises(DatabaseError):  # it needs a database that was migrated
        run_controller(load_settings(file), None, threading.Event())


STARTS: dict[str, Callable[[Path], object]] = {
    "api": lambda file: Services.open(load_settings(file)),
    "controller": _controller,
    "up": lambda file: _place(file, None),
    "migrate": _command("database", "migrate"),
    "bootstrap": _command("keys", "bootstrap"),
}


@pytest.mark.parametrize("there", [False, True], ids=["new", "open to all"])
@pytest.mark.parametrize("first", STARTS)
def test_home_is_closed_by_whichever_process_is_first(
    tmp_path: Path, first: str, there: bool
) -> None:
    home = tmp_path / "srv" / "safeft"
    if there:
        home.mkdir(parents=True)
        home.chmod(0o755)
    file = tmp_path / "plane.yaml"
    served = "base_models: {tiny: {source: unused, serving: 'http://127.0.0.1:9'}}"
    file.write_text(f"home: {home}\ndatabase: sqlite:///{tmp_path}/state/state.db\n{served}\n")
    STARTS[first](file)
    assert home.stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_closed_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refused)  # it is somebody else's
    with pytest.raises(InputError, match=r"home: .* \(Operation not permitted\)"):
        Settings(home=tmp_path).make_home()

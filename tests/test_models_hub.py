"""Models from a hub: the real client against a small server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = Path(__file__).parent.parent
PROGRAM = """
import sys
from safeft.errors import ModelError
from safeft.models import resolve
try:
    print("path", resolve(sys.argv[1]))
except ModelError as error:
    print("error", error)
"""


@dataclass
class Hub:
    """One repository, org/name, with one branch, main, at one commit."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        path = path.partition("?")[0]
        if path.startswith("/api/models/org/gated"):
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if not path.startswith(("/api/models/org/name/", "/org/name/resolve/")):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path.startswith("/org/name/resolve/"):
            content = self.files[path.split("/", 5)[5]]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return 200, headers, content
        kind, revision = path.split("/")[5:7]
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind == "revision":
            siblings = [{"rfilename": n, "size": len(c)} for n, c in self.files.items()]
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            return 200, {}, json.dumps(info).encode()
        tree = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in self.files.items()
        ]
        return 200, {}, json.dumps(tree).encode()


@pytest.fixture
def hub(tiny_dir: Path) -> Iterator[Hub]:
    content = {file.name: file.read_bytes() for file in tiny_dir.iterdir()}
    hub = Hub(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def resolve(hub: Hub, home: Path, source: str, **env: str) -> str:
    """In a process of its own: the client reads its environment when it is imported."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, source],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_repository_is_downloaded_without_pickles_and_code(
    hub: Hub, tmp_path: Path, tiny_dir: Path
) -> None:
    expected = set(hub.files)
    hub.files |= {
        "pytorch_model.bin": b"a pickle",
        "modeling.py": b"raise SystemExit",
        "onnx/config.json": b"{}",
        "consolidated.safetensors": b"the same again",
    }
    kind, _, path = resolve(hub, tmp_path, "hf:org/name").partition(" ")
    assert kind == "path"
    assert {file.name for file in Path(path).iterdir()} == expected
    for name in expected:
        assert (Path(path) / name).read_bytes() == (tiny_dir / name).read_bytes()


def test_a_pinned_model_needs_the_network_only_once(hub: Hub, tmp_path: Path) -> None:
    first = resolve(hub, tmp_path, f"hf:org/name@{COMMIT}")
    assert first.startswith("path")
    hub.asked.clear()
    assert resolve(hub, tmp_path, f"hf:org/name@{COMMIT}") == first
    assert hub.asked == []


def test_offline_by_request_takes_what_is_there_and_says_what_is_not(
    hub: Hub, tmp_path: Path
) -> None:
    first = resolve(hub, tmp_path, "hf:org/name")
    assert first.startswith("path")
    assert resolve(hub, tmp_path, "hf:org/name", HF_HUB_OFFLINE="1") == first
    missing = resolve(hub, tmp_path / "empty", "hf:org/name", HF_HUB_OFFLINE="1")
    assert missing.startswith("error hf:org/name@main: is not in the local hub cache")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:org/nowhere", "there is no such repository"),
        ("hf:org/name@nothing", "the repository has no revision 'nothing'"),
        ("hf:org/gated", "is gated; accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    hub: Hub, tmp_path: Path, source: str, says: str
) -> None:
    output = resolve(hub, tmp_path, source)
    assert output.startswith("error") and says in output
    assert "\n" not in output


def test_an_unreachable_hub_is_said_to_be_unreachable(tmp_path: Path) -> None:
    output = resolve(Hub(url="http://127.0.0.1:9"), tmp_path, "hf:org/name")
    assert output.startswith("error hf:org/name@main: cannot download from the hub")
    assert "\n" not in output


def test_a_repository_of_pickles_is_refused_before_anything_is_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    output = resolve(hub, tmp_path, "hf:org/name")
    assert "holds pickle weights only (pytorch_model.bin)" in output
    assert not any("/resolve/" in path for path in hub.asked)

"""Ray for one process: nothing of it is left, and a wrong address is said at once."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import grpc
import pytest

from jobs.runtime import embedded_ray
from safeft.errors import InputError
from tests.tinyjob import MARK, processes

SCRIPT = """
import ray, time
from jobs.runtime import embedded_ray
with embedded_ray(num_cpus=1):
    with embedded_ray():  # an inner one uses the outer one's Ray and leaves it running
        pass
    assert ray.is_initialized()
    print(ray.get_runtime_context().gcs_address, flush=True)
    time.sleep(600)
"""


def asked(address: str, token: str) -> grpc.StatusCode:
    """What Ray's control store answers to somebody with this token."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        bearer = [("authorization", f"Bearer {token}")] if token else []
        try:
            ask(b"", metadata=bearer, timeout=60)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("moment", ["while Ray starts", "while Ray runs"])
def test_a_terminated_process_leaves_no_ray_behind(moment: str, tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {
        **os.environ,
        **{MARK: uuid.uuid4().hex, "TMPDIR": str(temporary), "HOME": str(home)},
    }
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    if moment == "while Ray runs":
        address = child.stdout.readline().decode().strip()
        token = home / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600 and token.read_text()
        assert asked(address, token.read_text()) is grpc.StatusCode.OK
        for other in ("0" * 64, ""):
            assert asked(address, other) is grpc.StatusCode.UNAUTHENTICATED
    while not (servers := processes(b"gcs_server", environment[MARK])):
        assert child.poll() is None
        time.sleep(0.01)
    command = Path(f"/proc/{servers[0]}/cmdline").read_text()
    sessions = {Path(found) for found in re.findall(r"/[^\0=]*?/safeft-\w{8}(?=/)", command)}
    assert len(sessions) == 1 and all(session.is_dir() for session in sessions)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) != 0
    child.stdout.close()
    assert not processes(mark=environment[MARK])
    assert not list(temporary.iterdir())
    assert not any(session.exists() for session in sessions)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("auto", "must be host:port of a Ray cluster, not auto"),
        ("ray://head:10001", "must be host:port"),
        ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"),
        ("127.0.0.1:99999", "no Ray answers at 127.0.0.1:99999"),
    ],
)
def test_an_address_without_ray_is_named_at_once(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message), embedded_ray(address):
        pass

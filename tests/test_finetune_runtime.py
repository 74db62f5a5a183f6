"""Ray for one process: nothing of it is left, and a wrong address is said at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

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
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("moment", ["while Ray starts", "while Ray runs"])
def test_a_terminated_process_leaves_no_ray_behind(moment: str, tmp_path: Path) -> None:
    environment = {**os.environ, MARK: uuid.uuid4().hex, "TMPDIR": str(tmp_path)}
    before = set(Path("/tmp").glob("safeft-*"))  # a long TMPDIR is not used for sockets
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    if moment == "while Ray runs":
        assert child.stdout.readline() == b"ready\n"
    while not processes(b"gcs_server", environment[MARK]):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) != 0
    child.stdout.close()
    assert not processes(mark=environment[MARK])
    assert not list(tmp_path.iterdir())
    assert set(Path("/tmp").glob("safeft-*")) <= before


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

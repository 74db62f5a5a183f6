"""A Ceph of our own with its S3 gateway, for the tests of the artifact store.

One monitor, one storage daemon in memory, one gateway, in a directory that vanishes at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
ACCESS, SECRET = "tester", "tester-secret"
_PATIENCE_S = 300.0  # of a busy machine; an idle one takes 15
_CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon}
ms bind ipv6 = false
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = true
mon allow pool delete = true
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {home}/mon
mon warn on pool no redundancy = false
osd data = {home}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
run dir = {home}
admin socket = {home}/$name.asok
pid file =
log file = {home}/$name.log
crash dir = {home}
keyring = {home}/keyring
debug ms = 0
setuser match path =
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw data = {home}
rgw enable usage log = false
rgw lc debug interval = -1
"""


class NotStarted(Exception):
    """It is installed and does not run here: not a matter of what is tested on it."""


def missing() -> list[str]:
    """The programs that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def own_ceph() -> Iterator[str]:
    """The gateway's address. Its user has the credentials ACCESS and SECRET.

    Raises:
        NotStarted: with Ceph's own words.
    """
    home = Path(tempfile.mkdtemp(prefix="safeft-ceph-", dir="/tmp"))  # sockets need a short path
    mon, gateway = _free_ports(2)
    fsid = str(uuid.uuid4())
    config = home / "ceph.conf"
    config.write_text(_CONFIG.format(fsid=fsid, mon=mon, gateway=gateway, home=home))
    for name in ("mon", "osd"):
        (home / name).mkdir()
    running: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "CEPH_CONF": str(config), "LC_ALL": "C"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S
        )
        if done.returncode != 0:
            raise NotStarted(f"{' '.join(command)}: {done.stderr[-300:]}")
        return done.stdout

    def start(*command: str) -> subprocess.Popen[bytes]:
        with (home / "daemons.log").open("ab") as log:
            started = subprocess.Popen([*command, "-f"], env=environment, stdout=log, stderr=log)
        running.append(started)
        return started

    def stored() -> bool:
        # A monitor that has just begun may refuse the daemon ("wrong fsid"), which then ends.
        if running[-1].poll() is not None:
            start("ceph-osd", "-i", "0")
        try:
            return '"num_up_osds": 1' in run("ceph", "osd", "stat", "-f", "json-pretty")
        except NotStarted:  # nor may it know its own commands yet
            return False

    try:
        monmap = str(home / "monmap")
        address = f"[v1:127.0.0.1:{mon}]"
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        run("ceph", "--connect-timeout", "60", "osd", "new", osd, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0")
        _await(stored)
        # Before the gateway begins: both would make the default zone, and differ in it.
        user = ("--uid", "tester", "--display-name", "tester")
        keys = ("--access-key", ACCESS, "--secret-key", SECRET)
        run("radosgw-admin", "user", "create", *user, *keys)
        start("radosgw", "-n", "client.rgw")
        url = f"http://127.0.0.1:{gateway}"
        _await(lambda: _answers(url))
        _await(lambda: _knows_us(url), 60)
        yield url
    finally:
        for process in running:
            process.kill()
            process.wait()
        shutil.rmtree(home, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def _knows_us(url: str) -> bool:
    """Whether the gateway has found the user, who was made by another process."""
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS,
        aws_secret_access_key=SECRET,
    )
    try:
        client.list_buckets()
    except ClientError:
        return False
    return True


def _await(met: Callable[[], bool], patience_s: float = _PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not met():
        if time.monotonic() > deadline:
            raise NotStarted(f"not after {patience_s:g} s")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]

"""`safeft up` as a user runs it: it comes up, says where, and leaves nothing behind on Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.serving.client import Admin
from cluster.serving.pool import token
from safeft.models import weights_hash
from safeft.profile import SafetyProfile
from tests.test_prometheus_live import ask, firing
from tests.test_serving_ray import eventually, free_port, row
from tests.tinyadapters import save_adapter


def write_baseline(model_dir: Path, root: Path) -> None:
    """A profile with nothing but a baseline, of a model that refuses what it should."""
    profile = SafetyProfile.for_weights(weights_hash(model_dir), root)
    directory = profile.root / "baseline"
    directory.mkdir(parents=True)
    hits = {"harmful": 480, "benign": 10}
    sets = {kind: {"refusal": {"hits": n, "n": 500}} for kind, n in hits.items()}
    (directory / "evaluation.json").write_text(json.dumps({"refusals": {"sets": sets}}))
    profile.write_record(directory, {})


def test_up_serves_quarantines_and_stops_on_ctrl_c(tiny_dir: Path, tmp_path: Path) -> None:
    write_baseline(tiny_dir, tmp_path / "profile")
    save_adapter(tmp_path / "adapter", 1)
    command = [
        *(sys.executable, "-m", "cluster.cli.main", "up", "--model", str(tiny_dir), "--json"),
        *("--profile", str(tmp_path / "profile"), "--state", str(tmp_path / "state")),
        *("--adapter", f"acme/bot={tmp_path / 'adapter'}"),
        *("--port", str(free_port()), "--metrics-port", "0", "--prometheus-port", "0"),
    ]
    errors = (tmp_path / "errors").open("w")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:  # ends where the process does
            lines.append(line)
            if line == "}\n":
                break
        else:
            pytest.fail((tmp_path / "errors").read_text())
        addresses = json.loads("".join(lines))
        models = httpx.get(f"{addresses['api']}/models").json()["data"]
        assert sorted(model["id"] for model in models) == sorted(["acme/bot", str(tiny_dir)])
        assert "safeft_gate_models" in httpx.get(addresses["metrics"]).text
        url = addresses["api"].removesuffix("/v1")
        admin = Admin(url, token(Path(addresses["state"]) / "admin-token"))
        # A random model refuses nothing, and is found out.
        eventually(lambda: row(admin, "acme/bot")["state"] == "quarantined")
        assert ("prometheus" in addresses) == bool(shutil.which("prometheus"))
        if watcher := addresses.get("prometheus"):
            eventually(lambda: ("SafeftGateQuarantined", "acme/bot") in firing(watcher))
            assert ask(watcher, 'up{job="ray"} == 1')
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=180) == 0, (tmp_path / "errors").read_text()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=180)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{addresses['api']}/models")

"""`safeft up` as a user runs it: it comes up, says where, and leaves nothing behind on Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml

from cluster.serving.client import Admin
from cluster.serving.front import ADMIN_TOKEN
from cluster.settings import load_settings
from cluster.state import Database
from safeft.models import weights_hash
from safeft.profile import SafetyProfile
from tests.control.chat_world import Plane
from tests.control.server import running_api
from tests.test_cli import assert_one_clear_line, safeft
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


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_is_one_line_with_the_way_out(tiny_dir: Path) -> None:
    done = safeft("up", "--engine", "vllm", "--model", str(tiny_dir))
    assert_one_clear_line(done, "vllm is not installed", "safeft[vllm]", "transformers")


@pytest.mark.usefixtures("no_ray")
def test_up_serves_what_the_control_plane_publishes_to_its_api_and_stops_on_ctrl_c(
    tiny_dir: Path, tmp_path: Path
) -> None:
    write_baseline(tiny_dir, tmp_path / "profile")
    save_adapter(tmp_path / "adapter", 1)
    url = f"http://127.0.0.1:{free_port()}"
    offer = {"source": str(tiny_dir), "profile": str(tmp_path / "profile"), "serving": url}
    plane_file = tmp_path / "plane.yaml"
    plane_file.write_text(
        yaml.safe_dump({"home": str(tmp_path / "home"), "base_models": {"base": offer}})
    )
    command = [
        *(sys.executable, "-m", "cluster.cli.main", "up", "--settings", str(plane_file), "--json"),
        *("--adapter", f"acme/bot={tmp_path / 'adapter'}"),
        *("--metrics-port", "0", "--prometheus-port", "0"),
    ]
    errors = (tmp_path / "errors").open("w")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=dict(os.environ),
        # Whoever runs the tests in the background may have let them ignore what Ctrl-C sends.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
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
        assert addresses["api"] == f"{url}/v1"
        assert addresses["models"] == ["base", "acme/bot"]
        assert "safeft_gate_models" in httpx.get(addresses["metrics"]).text
        assert httpx.get(f"{url}/v1/models").status_code == 401  # the control plane's API only
        admin = Admin(url, (Path(addresses["state"]) / ADMIN_TOKEN).read_text())
        _chat_through_the_api(plane_file, tiny_dir, admin)
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


def _chat_through_the_api(plane_file: Path, tiny_dir: Path, admin: Admin) -> None:
    settings = load_settings(plane_file)
    database = Database(settings.database_url)
    database.migrate()
    with running_api(database, settings.home, settings=settings) as api:
        plane = Plane(api, None, settings.home)
        plane.changed = {"base_weights": weights_hash(tiny_dir)}
        client = api.tenant("ten_a")
        model = plane.tune(client)
        plane.registrar.look()
        eventually(lambda: row(admin, model)["state"] == "quarantined")
        asked = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}

        def refusal() -> str | None:
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(model=model, **asked)
            return caught.value.code

        eventually(lambda: refusal() == "safety_quarantined")
        admin.post("decisions", action="release", model=model, reason="a test's", actor="pytest")
        eventually(lambda: bool(client.chat.completions.create(model=model, **asked).choices))
        chunks = list(client.chat.completions.create(model=model, **asked, stream=True))
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        headers = {"Authorization": f"Bearer {client.api_key}"}

        def metered() -> bool:  # an answer is counted after its last byte was sent
            api.services.meter.flush()
            used = httpx.get(f"{api.url}/v1/safety/usage", headers=headers).json()["chat"]
            return bool(used["requests"] >= 2 and used["completion_tokens"] > 0)

        eventually(metered)
    database.close()

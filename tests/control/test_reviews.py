"""What waits for an administrator: a risky dataset, or a model before it is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import select

from cluster.api.reviews import Decision
from cluster.controller import sweep
from cluster.controller.reviews import decide
from cluster.controller.runner import Report
from cluster.job_request import CreateJob
from cluster.job_spec import accepted, finetune_spec
from cluster.settings import BaseModelOffer
from cluster.state import Database
from cluster.state.models import AuditEntry, Job
from cluster.tenancy.tenants import Policy
from safeft.errors import InputError
from tests.control.rows import add_tenant
from tests.control.server import Api, running_api
from tests.control.stages import World, facts_of
from tests.control.test_api import submit
from tests.control.test_cli_remote import run

WAITS = {
    "screening": Report("review", message="9 rows are risky", facts={"reason": "9 rows are risky"}),
    "evaluating": Report("review", message="refuses 99 %", facts={**facts_of("", "evaluating")}),
}
SUBJECT = {"screening": "dataset", "evaluating": "publication"}
WAY = ["validating", "screening", "training", "evaluating", "publishing"]


@pytest.fixture
def world(database: Database, tmp_path: Path) -> World:
    return World(database, tmp_path)


def wait(world: World, stage: str) -> None:
    """Bring ftjob-1 to where it waits for a person after `stage`."""
    world.add_job()
    world.runner.script[stage] = WAITS[stage]
    world.round(4)
    assert world.job().phase == "awaiting_review"


def say(world: World, approved: bool) -> None:
    with world.database.system() as session:
        job = session.get_one(Job, "ftjob-1")
        decide(session, job, approved=approved, by="key:x", reason="I read them", now=world.now)


@pytest.mark.parametrize("stage", ["screening", "evaluating"])
def test_a_job_waits_without_taking_room_and_goes_on_when_it_is_approved(
    world: World, stage: str
) -> None:
    wait(world, stage)
    assert world.runner.names() == set() and world.job().lock_token is None
    world.controller = world.make()  # it is no controller's memory that waits
    world.round(3, seconds=3600)
    assert world.job().phase == "awaiting_review" and world.job().faults == 0
    say(world, approved=True)
    world.round(3)
    job = world.job()
    assert job.phase == "succeeded"
    # No stage was done again.
    assert [name.split(":")[1] for name in world.runner.started] == WAY
    review = job.facts[f"{SUBJECT[stage]}_review"]
    assert (review["approved"], review["by"], review["reason"]) == (True, "key:x", "I read them")


@pytest.mark.parametrize(
    ("stage", "code"), [("screening", "dataset_rejected"), ("evaluating", "publication_rejected")]
)
def test_a_rejected_job_ends_with_the_reason(world: World, stage: str, code: str) -> None:
    wait(world, stage)
    say(world, approved=False)
    job = world.job()
    assert (job.phase, job.error_code, job.model_id) == ("failed", code, None)
    assert "by an administrator: I read them" in str(job.error_message)
    assert job.finished_at == world.now
    world.round(3)
    assert world.job().phase == "failed" and world.runner.names() == set()


@pytest.mark.parametrize("stage", ["screening", "evaluating"])
def test_while_one_waits_the_room_is_anothers(sqlite_url: str, tmp_path: Path, stage: str) -> None:
    world = World(Database(sqlite_url), tmp_path, compute_slots=1, intake_slots=1)
    wait(world, stage)
    del world.runner.script[stage]
    world.add_job("ftjob-2")
    world.round(4)
    assert world.job("ftjob-2").phase == "succeeded"
    assert world.job().phase == "awaiting_review"


@pytest.fixture
def api(database: Database, tmp_path: Path) -> Iterator[Api]:
    with running_api(database, tmp_path / "home") as found:
        yield found


@pytest.fixture
def admin_key(api: Api) -> str:
    return api.key(add_tenant(api.database, "ten_admin"), role="admin")


def waiting_job(api: Api, tenant: str = "ten_a", of: str = "dataset") -> tuple[openai.OpenAI, str]:
    client = api.tenant(tenant)
    job = submit(client).id
    with api.database.system() as session:
        row = session.get_one(Job, job)
        row.phase, row.facts = "awaiting_review", {"screening": {"reason": "9 rows are risky"}}
        row.resume_phase = "queued" if of == "dataset" else "publishing"
    return client, job


def post(api: Api, key: str, path: str, reason: Any = "I read them", **headers: str) -> Any:
    return httpx2.post(
        f"{api.url}/v1/safety/admin/{path}",
        headers={"Authorization": f"Bearer {key}", **headers},
        json={"reason": reason},
    )


def test_administrators_find_decide_and_answer_for_it(api: Api, admin_key: str) -> None:
    client, job = waiting_job(api)
    shown = client.fine_tuning.jobs.retrieve(job)
    assert (shown.status, shown.phase) == ("queued", "awaiting_review")  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="waits for an administrator"):
        client.fine_tuning.jobs.pause(job)
    headers = {"Authorization": f"Bearer {admin_key}"}
    listed = httpx2.get(f"{api.url}/v1/safety/admin/reviews", headers=headers).json()["data"]
    assert [(one["id"], one["of"], one["tenant"]) for one in listed] == [(job, "dataset", "ten_a")]
    for reason in ("", "  x ", None):
        assert post(api, admin_key, f"jobs/{job}/approve", reason).status_code == 400
    # A tenant decides nothing, not even of its own job; a repeated request decides once.
    own = post(api, str(client.api_key), f"jobs/{job}/approve")
    assert own.json()["error"]["code"] == "not_an_administrator"
    key = {"Idempotency-Key": "once"}
    first = post(api, admin_key, f"jobs/{job}/approve", **key)
    assert first.json()["phase"] == "queued"
    assert post(api, admin_key, f"jobs/{job}/approve", **key).json() == first.json()
    assert client.fine_tuning.jobs.retrieve(job).status == "queued"
    again = post(api, admin_key, f"jobs/{job}/reject")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "nothing_to_decide")
    assert post(api, admin_key, "jobs/ftjob-none/approve").status_code == 404
    with api.database.system_read() as session:
        entry = session.scalars(select(AuditEntry).where(AuditEntry.action == "job.approve")).one()
    assert (entry.object_id, entry.tenant_id, entry.reason) == (job, "ten_a", "I read them")
    assert json.loads(str(entry.before))["of"] == "dataset"


def test_cancelling_while_it_waits_frees_everything(api: Api, admin_key: str) -> None:
    client, job = waiting_job(api, of="publication")
    work = api.services.settings.work / job
    work.mkdir(parents=True)
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    assert post(api, admin_key, f"jobs/{job}/approve").status_code == 400
    sweep.remove_work(api.services.settings.work, api.database)
    assert not work.exists()


def test_decisions_and_policies_on_the_command_line(
    api: Api, admin_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEFT_API", api.url)
    monkeypatch.setenv("SAFEFT_API_KEY", admin_key)
    _, job = waiting_job(api)
    _, other = waiting_job(api, "ten_b")
    listed = run("jobs", "waiting")
    assert job in listed and other in listed
    assert "queued" in run("jobs", "approve", job, "--reason", "I read them")
    assert "failed" in run("jobs", "reject", other, "--reason", "no licence")
    assert "ftjob" not in run("jobs", "waiting")
    assert json.loads(run("jobs", "--json")) == []  # the administrator's own tenant has none
    limits = tmp_path / "limits.yaml"
    limits.write_text("row_threshold: 0.5\n")
    words = ["policy", "set", "ten_b", "--on-risk", "review", "--require-approval"]
    policy = json.loads(run(*words, "--screening", limits, "--reason", "contract 17"))
    assert (policy["on_risk"], policy["require_approval"]) == ("review", True)
    assert policy["screening"] == {"row_threshold": 0.5}
    policy = json.loads(run("policy", "set", "ten_b", "--no-approval", "--reason", "contract 18"))
    assert (policy["on_risk"], policy["require_approval"]) == ("review", False)


def offer() -> BaseModelOffer:
    return BaseModelOffer(source="demo:aligned")


def request(**screening: Any) -> CreateJob:
    method = {"supervised": {"screening": screening}}
    return CreateJob.model_validate({"model": "m", "training_file": "f", "method": method})


def test_a_policy_reaches_the_job_and_a_job_may_only_be_stricter() -> None:
    reviewed = Policy(on_risk="review")
    kept = accepted(request(), reviewed, offer())
    where = Path("/nowhere")
    spec = finetune_spec(kept, name="x", offer=offer(), train=where, validation=None, output=where)
    assert spec.screening.on_risk == "review"
    kept = accepted(request(on_risk="reject", policy={"row_threshold": 1.5}), reviewed, offer())
    spec = finetune_spec(kept, name="x", offer=offer(), train=where, validation=None, output=where)
    assert (spec.screening.on_risk, spec.screening.policy.row_threshold) == ("reject", 1.5)
    for policy, asked in ((Policy(), "drop"), (Policy(), "review"), (reviewed, "drop")):
        with pytest.raises(InputError, match=r"screening\.on_risk: your policy allows reject"):
            accepted(request(on_risk=asked), policy, offer())


@pytest.mark.parametrize(
    "policy",
    [
        {"screening": {"row_threshold": float("nan")}},
        {"screening": {"no_such_limit": 1}},
        {"screening": {"override": {"administrator": "me"}}},
        {"on_risk": "ignore"},
    ],
)
def test_a_policy_that_means_nothing_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Policy.model_validate(policy)


def test_a_reason_is_one() -> None:
    assert Decision(reason="  I read them ").reason == "I read them"

"""The status page over real HTTP: who sees what, and what a hostile name can do (nothing)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from cluster.api.pages.timeline import timeline
from cluster.controller.phases import FINAL, STAGES, WAITING
from cluster.events import add_event
from cluster.provenance import Signed, SigningKey, Statement
from cluster.state import Database
from cluster.state.models import ApiKey, BrowserSession, Job, PublishedModel, Stage, Tenant
from cluster.tenancy.browser_sessions import SESSION_S
from cluster.tenancy.quotas import RateLimiter
from tests.control.page_rows import EVALUATION, SCREENING, add_jobs, add_model, add_stages
from tests.control.rows import add_tenant, file_row, job_row
from tests.control.server import Api, running_api
from tests.control.stages import FACTS, facts_of

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 'q'*9 }}"
PHASES = (*WAITING, *STAGES, *FINAL)


class Clock:
    now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api(sqlite_url: str, tmp_path: Path, clock: Clock) -> Iterator[Api]:
    database = Database(sqlite_url)
    options: Any = {"rates": RateLimiter(clock=lambda: 0.0), "clock": clock}
    with running_api(database, tmp_path, **options) as found:
        yield found
    database.close()


class Browser:
    """Somebody with cookies; `page` is the text of a page that must be there."""

    def __init__(self, api: Api) -> None:
        self.http = httpx2.Client(base_url=api.url, follow_redirects=True, timeout=60)

    def log_in(self, key: str, **fields: Any) -> httpx2.Response:
        return self.http.post("/status/login", data={"key": key, **fields})

    def get(self, path: str) -> httpx2.Response:
        return self.http.get(path)

    def page(self, path: str) -> str:
        answer = self.get(path)
        assert answer.status_code == 200, (path, answer.text)
        return answer.text


def logged_in(api: Api, tenant: str, **key: Any) -> Browser:
    browser = Browser(api)
    answer = browser.log_in(api.key(tenant, **key))
    assert answer.status_code == 200 and answer.url.path == "/status/"
    return browser


def pages_of(job_id: str, model: str) -> list[str]:
    job = f"/status/jobs/{job_id}"
    return [job, f"{job}/screening", f"/status/models/{model}"]


def test_a_key_opens_a_session_whose_cookie_holds_nothing_of_it(api: Api) -> None:
    key = api.key(add_tenant(api.database))
    browser = Browser(api)
    browser.http.follow_redirects = False
    answer = browser.log_in(key)
    assert (answer.status_code, answer.headers["location"]) == (303, "/status/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Secure" not in cookie
    token = browser.http.cookies["safeft"]
    prefix, secret = key.split("-")[1:]
    assert secret not in cookie and prefix not in cookie and token not in key
    with api.database.system_read() as session:
        [row] = session.scalars(select(BrowserSession))
    assert row.token_sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert "Jobs" in browser.page("/status/")


@pytest.mark.parametrize("wrong", ["", "sf-0-0", "sf-" + "0" * 12 + "-" + "0" * 64, HOSTILE])
def test_a_wrong_key_opens_nothing_and_is_not_shown_again(api: Api, wrong: str) -> None:
    browser = Browser(api)
    answer = browser.log_in(wrong)
    assert answer.status_code in (400, 401)
    assert "safeft" not in browser.http.cookies and "alert(1)" not in answer.text
    assert browser.get("/status/").status_code == 401


def test_who_is_not_logged_in_gets_the_form_and_then_the_page_that_was_asked_for(api: Api) -> None:
    key = api.key(add_tenant(api.database))
    with api.database.system() as session:
        session.add(job_row("ten_a", "ftjob-1"))
    browser = Browser(api)
    for path in ("/status/", "/status/models", "/status/fleet", *pages_of("ftjob-1", "ft:x")):
        answer = browser.get(path)
        assert answer.status_code == 401 and "ftjob-1</h1>" not in answer.text
        assert f'name="back" value="{path}"' in answer.text
    assert browser.log_in(key, back="/status/jobs/ftjob-1").url.path == "/status/jobs/ftjob-1"


@pytest.mark.parametrize("back", ["https://evil.example/", "//evil.example", "/\\evil", "/v1/x"])
def test_a_login_leads_to_a_page_of_ours_only(api: Api, back: str) -> None:
    key = api.key(add_tenant(api.database))
    browser = Browser(api)
    browser.http.follow_redirects = False
    assert browser.log_in(key, back=back).headers["location"] == "/status/"


@pytest.mark.parametrize("path", ["login", "logout"])
@pytest.mark.parametrize(
    "header", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}]
)
def test_forms_of_other_sites_are_refused(api: Api, path: str, header: dict[str, str]) -> None:
    browser = logged_in(api, add_tenant(api.database))
    form = {"key": api.key("ten_a")}
    answer = browser.http.post(f"/status/{path}", data=form, headers=header)
    assert answer.status_code == 403 and "set-cookie" not in answer.headers
    assert browser.get("/status/").status_code == 200
    own = {"Sec-Fetch-Site": "same-origin", "Origin": api.url}
    assert browser.http.post(f"/status/{path}", data=form, headers=own).status_code == 200


def test_a_session_ends_with_its_key_its_tenant_its_time_and_at_the_logout(
    api: Api, clock: Clock
) -> None:
    add_tenant(api.database)

    def ends(browser: Browser) -> None:
        answer = browser.get("/status/")
        assert answer.status_code == 401 and "Your session has ended" in answer.text

    revoked, expired, out = (logged_in(api, "ten_a") for _ in range(3))
    with api.database.system() as session:
        first = session.scalars(select(BrowserSession.key_id)).first()
        one = session.get_one(ApiKey, first)
        one.revoked_at = clock.now
    [over] = [b for b in (revoked, expired, out) if b.get("/status/").status_code == 401]
    ends(over)
    rest = [b for b in (revoked, expired, out) if b is not over]

    cookie = rest[0].http.cookies["safeft"]
    assert rest[0].http.post("/status/logout").status_code == 200
    assert "safeft" not in rest[0].http.cookies
    rest[0].http.cookies.set("safeft", cookie)  # kept by somebody: worth nothing any more
    ends(rest[0])

    clock.now += SESSION_S - 1
    rest[1].page("/status/")
    clock.now += 1
    ends(rest[1])

    suspended = logged_in(api, "ten_a")
    with api.database.system() as session:
        session.get_one(Tenant, "ten_a").suspended_at = clock.now
        assert len(session.scalars(select(BrowserSession)).all()) == 1  # the old ones are removed
    ends(suspended)


def test_attempts_to_log_in_are_limited(api: Api) -> None:
    key = api.key(add_tenant(api.database))
    browser = Browser(api)
    answers = [browser.log_in("sf-x") for _ in range(11)]
    assert [a.status_code for a in answers] == [401] * 10 + [429]
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert browser.log_in(key).status_code == 429  # also with the right one


def test_pages_count_as_requests_of_their_tenant(api: Api) -> None:
    browser = logged_in(api, add_tenant(api.database, requests_per_second=2.0))
    assert [browser.get("/status/").status_code for _ in range(4)] == [200] * 3 + [429]


def test_a_tenant_sees_nothing_of_another(api: Api) -> None:
    for tenant in ("ten_a", "ten_b"):
        add_tenant(api.database, tenant)
        add_jobs(api, tenant)
    model = add_model(api, "ftjob-ten_b-succeeded")
    browser = logged_in(api, "ten_a")
    for path in ("/status/", "/status/?phase=training", "/status/models"):
        assert "ten_b" not in browser.page(path)
    theirs = pages_of("ftjob-ten_b-succeeded", model)
    nobodys = pages_of("ftjob-ten_c-succeeded", model.replace("ten_b", "ten_c"))
    for path, absent in zip(theirs, nobodys, strict=True):
        found, none = browser.get(path), browser.get(absent)
        assert (found.status_code, none.status_code) == (404, 404)
        assert found.text.replace("ten_b", "ten_c") == none.text
    after = browser.get("/status/?after=ftjob-ten_b-queued")
    assert after.status_code == 404
    assert browser.get("/status/fleet").status_code == 403
    assert all(logged_in(api, "ten_b").page(path) for path in theirs)


def test_an_administrator_sees_all_and_the_fleet(api: Api) -> None:
    add_tenant(api.database, "ten_a")
    add_tenant(api.database, "ten_b", max_gpu_seconds=500.0)
    add_jobs(api, "ten_b")
    add_stages(api, "ftjob-ten_b-training", ("training", 100.0, 142.0, "done"))
    browser = logged_in(api, "ten_a", role="admin")
    assert "ftjob-ten_b-training" in browser.page("/status/")
    assert "ftjob-ten_b-training" in browser.page("/status/jobs/ftjob-ten_b-training")
    fleet = browser.page("/status/fleet")
    assert "42 of 500" in fleet and "session.open" in fleet
    assert "2 of 1 slot in use" in fleet and "4 of 2 slots in use" in fleet


def test_a_key_shows_what_its_scopes_let_it_read(api: Api) -> None:
    add_tenant(api.database)
    add_jobs(api, "ten_a")
    model = add_model(api, "ftjob-ten_a-succeeded")
    jobs_only = logged_in(api, "ten_a", scopes=["jobs:read"])
    shown = jobs_only.page("/status/jobs/ftjob-ten_a-succeeded")
    assert "lacks the scope <code>safety:read" in shown and "Wilson" not in shown
    for path in ("/status/jobs/ftjob-ten_a-succeeded/screening", f"/status/models/{model}"):
        assert jobs_only.get(path).status_code == 403
    assert jobs_only.get("/status/models").status_code == 403
    models_only = Browser(api)
    models_only.log_in(api.key("ten_a", scopes=["models:read"]))
    assert models_only.get("/status/").status_code == 403
    assert model in models_only.page("/status/models")


class _Looked(HTMLParser):
    """Fails on anything that a page must not have; collects what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.refers: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        assert tag not in ("iframe", "object", "embed", "base", "style", "img")
        assert not any(name.startswith("on") or name == "style" for name in names)
        assert tag != "script" or names["src"] == "/status/assets/live.js"
        for name in ("href", "src", "action"):
            if names.get(name):
                self.refers.add(str(names[name]))


def refers(text: str) -> set[str]:
    looked = _Looked()
    looked.feed(text)
    return looked.refers


def test_hostile_names_are_text_and_nothing_comes_from_elsewhere(api: Api) -> None:
    add_tenant(api.database, "ten_a", name="<b>acme</b>")
    request = {"suffix": HOSTILE, "metadata": {HOSTILE: HOSTILE}}
    row = {"line": 1, "file": HOSTILE, "error": HOSTILE}
    with api.database.system() as session:
        session.add(file_row("ten_a", "file-1", filename=HOSTILE))
        facts = {
            "screening": {"verdict": "rejected", "reason": HOSTILE, "risky_rows": [row]},
            "evaluating": {**EVALUATION, "reason": HOSTILE},
        }
        job = job_row(
            "ten_a",
            "ftjob-1",
            phase="failed",
            base_model=HOSTILE,
            request=request,
            facts=facts,
            finished_at=2.0,
            error_code=HOSTILE,
            error_message=HOSTILE,
            error_param=HOSTILE,
        )
        session.add(job)
        session.flush()
        add_event(session, job, HOSTILE, now=2.0, level="error")
    model = add_model(api, "ftjob-1", kind="<script>alert")
    with api.database.system() as session:  # also of the gate
        session.get_one(Job, "ftjob-1").facts = facts
    browser = logged_in(api, "ten_a", role="admin")
    paths = ("/status/", "/status/models", "/status/fleet", *pages_of("ftjob-1", model))
    for path in (*paths, f"/status/jobs/{HOSTILE}", f"/status/?after={HOSTILE}"):
        text = browser.get(path).text
        assert "<script>alert" not in text and "<b>acme" not in text and "q" * 9 not in text
        assert all(link.startswith(("/status/", "#")) for link in refers(text)), path
    assert "&lt;script&gt;alert(1)" in browser.page("/status/jobs/ftjob-1")


def test_every_answer_has_the_policy_and_is_kept_by_nobody(api: Api) -> None:
    browser = logged_in(api, add_tenant(api.database))
    found = [browser.get(path) for path in ("/status/", "/status/jobs/x", "/status/x/y")]
    found += [browser.http.post("/status/login", data={}), browser.http.put("/status/login")]
    assets = {"style.css", "pages.css", "live.js", "icon.svg"}
    found += [browser.get(f"/status/assets/{name}") for name in (*assets, "../app.py", "x")]
    expected = [200, 404, 404, 400, 405, *[200] * 4, 404, 404]
    assert [a.status_code for a in found] == expected
    for answer in found:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    assert {f"/status/assets/{name}" for name in assets} <= refers(found[0].text)


def test_a_fault_of_ours_is_told_without_its_cause_and_with_the_policy(api: Api) -> None:
    browser = logged_in(api, add_tenant(api.database))
    with api.database.system() as session:
        session.add(job_row("ten_a", "ftjob-1", facts={"screening": ["not what it is"]}))
    answer = browser.get("/status/jobs/ftjob-1/screening")
    assert answer.status_code == 500 and "Internal error" in answer.text
    assert "not what it is" not in answer.text and "content-security-policy" in answer.headers


def test_pages_of_nothing_and_of_little_are_there(api: Api) -> None:
    browser = logged_in(api, add_tenant(api.database), role="admin")
    assert "No jobs yet" in browser.page("/status/")
    assert "Nothing is published yet" in browser.page("/status/models")
    browser.page("/status/fleet")
    assert browser.get("/status/?phase=flying").status_code == 400
    for phase in PHASES:  # without attempts, findings, events or times
        with api.database.system() as session:
            session.add(job_row("ten_a", f"ftjob-{phase}", phase=phase))
        assert f"ftjob-{phase}" in browser.page(f"/status/?phase={phase}")
        browser.page(f"/status/jobs/ftjob-{phase}")
    assert browser.get("/status/jobs/ftjob-queued/screening").status_code == 404
    little = {**FACTS, "publishing": facts_of("ftjob-succeeded", "publishing")}
    model = add_model(api, "ftjob-succeeded", provenance={})
    with api.database.system() as session:
        session.get_one(Job, "ftjob-succeeded").facts = little
    for path in pages_of("ftjob-succeeded", model):
        browser.page(path)
    assert "nobody vouches" in browser.page(f"/status/models/{model}")
    with api.database.system() as session:
        session.get_one(Job, "ftjob-succeeded").facts = {}
    assert "Not recorded" in browser.page(f"/status/models/{model}")


def test_a_jobs_page_tells_what_was_found(api: Api) -> None:
    add_tenant(api.database)
    add_jobs(api, "ten_a")
    job_id = "ftjob-ten_a-succeeded"
    model = add_model(api, job_id)
    browser = logged_in(api, "ten_a")
    shown = browser.page(f"/status/jobs/{job_id}")
    assert "96.7\xa0% (88.6–99.1)" in shown and "93.3\xa0% (84.1–97.4)" in shown  # 58, 56 of 60
    assert f'href="/status/jobs/{job_id}/screening"' in shown
    assert "support-chats.jsonl" in shown and "80.0 KiB" in shown and "probing" in shown
    report = browser.page(f"/status/jobs/{job_id}/screening")
    assert "4.25" in report and "1 of 120" in report
    with api.database.system() as session:
        session.add(job_row("ten_a", "ftjob-1", phase="failed", facts={"screening": SCREENING}))
    rejected = browser.page("/status/jobs/ftjob-1/screening")
    assert "no answer tokens" in rejected and "4.25" in rejected and "2 of 12" in rejected
    told = browser.page(f"/status/models/{model}")
    assert "ef" * 32 in told and api.services.public_key.id in told and "Signed by" in told
    with api.database.system() as session:
        row = session.get_one(Job, job_id)
        before = {"passed": False, "after": EVALUATION["before"]}
        added = {**row.facts.get("training", {}), "safety_rows": 16, "answer_rows": 32}
        row.facts = {**row.facts, "before_restoring": before, "training": added}
    assert "<dd>0 and 0</dd>" in shown  # of the model's own rows: none were asked for
    shown = browser.page(f"/status/jobs/{job_id}")
    assert "After restoring" in shown and "<dd>16 and 32</dd>" in shown


def test_a_manifest_that_another_key_signed_is_not_vouched_for(api: Api) -> None:
    add_tenant(api.database)
    add_jobs(api, "ten_a")
    model = add_model(api, "ftjob-ten_a-succeeded")
    with api.database.system() as session:
        row = session.get_one(PublishedModel, model)
        row.provenance = {**row.provenance, "signature": "AAAA"}
    told = logged_in(api, "ten_a").page(f"/status/models/{model}")
    assert "the signature does not fit the statement" in told and "Signed by" not in told


def test_a_restored_model_shows_the_version_that_there_is(api: Api) -> None:
    add_tenant(api.database)
    add_jobs(api, "ten_a")
    model = add_model(api, "ftjob-ten_a-succeeded")
    with api.database.system() as session:
        first = session.get_one(Job, "ftjob-ten_a-succeeded")
        facts = {**first.facts, "evaluating": {**EVALUATION, "reason": "restored since"}}
        facts["before_restoring"] = {"passed": False, "reason": "quarantined"}
        facts["dataset_review"] = {"approved": True, "by": "key:1", "reason": "looked at it"}
        session.add(job_row("ten_a", "ftjob-2", phase="succeeded", facts=facts, model_id=model))
        row = session.get_one(PublishedModel, model)
        statement = Statement.model_validate_json(Signed(**row.provenance).statement)
        key = SigningKey.load_or_create(api.services.settings.signing_key)
        row.provenance = key.sign(statement.model_copy(update={"job": "ftjob-2"})).model_dump()
    browser = logged_in(api, "ten_a")
    shown = browser.page(f"/status/models/{model}")
    assert "restored since" in shown and "After restoring" in shown
    assert 'href="/status/jobs/ftjob-2"' in shown and "ftjob-ten_a-succeeded" in shown
    job = browser.page("/status/jobs/ftjob-2")
    assert f"/status/models/{model.replace(':', '%3A')}" in job and "looked at it" in job


def test_the_list_is_paged_and_narrowed(api: Api) -> None:
    add_tenant(api.database)
    with api.database.system() as session:
        for number in range(30):
            phase = "training" if number < 3 else "queued"
            row = job_row("ten_a", f"ftjob-{number:02}", phase=phase, created_at=float(number))
            session.add(row)
    browser = logged_in(api, "ten_a")
    first = browser.page("/status/")
    assert "ftjob-29" in first and "ftjob-04" not in first and "?after=ftjob-05" in first
    older = browser.page("/status/?after=ftjob-05")
    assert "ftjob-04" in older and "ftjob-05</a>" not in older and "Newest" in older
    training = browser.page("/status/?phase=training")
    assert "ftjob-02" in training and "ftjob-29" not in training and "queued <b>27</b>" in training


def test_what_goes_on_is_asked_for_again_and_what_has_ended_is_not(api: Api) -> None:
    add_tenant(api.database)
    add_jobs(api, "ten_a")
    browser = logged_in(api, "ten_a")
    running = browser.page("/status/jobs/ftjob-ten_a-training")
    assert 'data-refresh="3"' in running
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in running
    assert 'href="/status/jobs/ftjob-ten_a-training?still=1"' in running
    for path in ("training?still=1", "succeeded"):
        text = browser.page(f"/status/jobs/ftjob-ten_a-{path}")
        assert "data-refresh" not in text and "http-equiv" not in text


def _stage(stage: str, begin: float, end: float | None, outcome: str | None) -> Stage:
    return Stage(stage=stage, started_at=begin, ended_at=end, outcome=outcome)


def test_the_timeline_is_what_was_what_is_and_what_is_to_come() -> None:
    job = job_row("t", "ftjob-1", phase="training", created_at=0.0, phase_since=9.0)
    stages = [
        _stage("validating", 1.0, 2.0, "done"),
        _stage("screening", 2.0, 5.0, "done"),
        _stage("training", 7.0, 8.0, "fault"),
        _stage("training", 9.0, None, None),
    ]
    steps = timeline(job, stages)
    past = [("submitted", 0, 1), ("validating", 1, 2), ("screening", 2, 5), ("queued", 5, 7)]
    assert [(s.phase, s.begin, s.end) for s in steps if s.state == "past"] == past
    assert [(s.phase, s.begin, s.attempts) for s in steps if s.state == "now"] == [
        ("training", 7.0, 2)
    ]
    to_come = ["evaluating", "publishing", "succeeded"]
    assert [s.phase for s in steps if s.state == "to come"] == to_come

    job.phase, job.resume_phase = "paused", "training"
    paused = [(s.phase, s.state) for s in timeline(job, stages)][-5:]
    assert paused == [("paused", "now"), *[(p, "to come") for p in ("training", *to_come)]]

    job.phase, job.resume_phase = "awaiting_review", "publishing"
    reviewed = [(s.phase, s.state) for s in timeline(job, stages)][-3:]
    assert reviewed == [("awaiting_review", "now"), *[(p, "to come") for p in to_come[1:]]]

    job.phase, job.resume_phase, job.finished_at = "failed", None, 11.0
    stages[-1].ended_at, stages[-1].outcome = 11.0, "refused"
    failed = timeline(job, stages)
    assert [(s.phase, s.stopped) for s in failed[-2:]] == [("training", True), ("failed", True)]
    assert not any(s.state == "to come" for s in failed)


def test_findings_keep_the_page_of_a_rejected_dataset_short(api: Api) -> None:
    add_tenant(api.database)
    rows = [{"line": line, "score": 1.0} for line in range(100)]
    facts = {"screening": {**SCREENING, "risky": 50_000, "risky_rows": rows}}
    with api.database.system() as session:
        session.add(job_row("ten_a", "ftjob-1", phase="failed", facts=facts))
    assert "100 of 50,000" in logged_in(api, "ten_a").page("/status/jobs/ftjob-1/screening")

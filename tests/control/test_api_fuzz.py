"""Whatever is sent to whichever route: never a 500, always an error in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.state import Database
from tests.control.postgresql import execute
from tests.control.server import Api, running_api

NASTY = st.one_of(
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "../../etc/passwd",
            "\0",
            "%",
            "a/b",
            "'",
            '"',
            "{}",
            "0",
            "-1",
            "ft:a:b::c",
        ]
    ),
    st.text(max_size=40),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), NASTY, st.just("tiny"), st.just("l2")
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY, inner, max_size=3)
)
FIELDS = [
    *("model", "training_file", "validation_file", "method", "type", "supervised", "metadata"),
    *("hyperparameters", "n_epochs", "constraints", "kind", "lam", "seed", "suffix", "reason"),
    *("name", "limits", "policy", "weight", "scopes", "role", "expires_at", "suspended"),
]
BODIES = st.recursive(
    VALUES, lambda inner: st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6), max_leaves=12
)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("fuzz")
    if request.param == "sqlite":
        database = Database(f"sqlite:///{home}/state.db")
    else:
        template = request.getfixturevalue("postgres")
        execute(template, "CREATE DATABASE fuzz")
        database = Database(template.format(name="fuzz"))
    database.migrate()
    with running_api(database, home) as found:
        found.tenant("ten_a", requests_per_second=1e9)
        yield found
    database.close()


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    key = api.key("ten_a", role="admin")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=api.url, headers=headers) as client:
        yield client


def routes(http: httpx2.Client) -> list[tuple[str, str, list[str]]]:
    found = []
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            names = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
            found.append((method.upper(), path, names))
    return sorted(found)


@settings(
    max_examples=120,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_nothing_makes_the_server_fail(http: httpx2.Client, data: st.DataObject) -> None:
    found = routes(http)
    assert len(found) >= 30
    method, path, names = data.draw(st.sampled_from(found))
    while "{" in path:
        head, _, rest = path.partition("{")
        path = head + quote(data.draw(NASTY), safe="") + rest.partition("}")[2]
    query = {name: data.draw(NASTY) for name in names if data.draw(st.booleans())}
    # A stream never ends here: no job does.
    query.pop("stream", None)
    options: dict[str, Any] = {}
    if method == "POST":
        content = data.draw(BODIES.map(json.dumps) | st.text(max_size=30))
        options["content"] = content.encode("utf-8", "surrogatepass")
        options["headers"] = {"Content-Type": "application/json"}
        if data.draw(st.booleans()):
            options["headers"]["Idempotency-Key"] = data.draw(st.sampled_from("abc"))
    answer = http.request(method, path, params=query, **options)
    assert answer.status_code < 500, (method, path, query, options, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

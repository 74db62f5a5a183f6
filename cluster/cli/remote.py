"""The API from the command line: every request may be repeated, so a dropped connection costs time.

Reads `SAFEFT_API` (where the API is) and `SAFEFT_API_KEY`.
"""

from __future__ import annotations

import io
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from safeft.errors import InputError, SafeftError
from safeft.progress import Progress, silent

DEFAULT_URL = "http://127.0.0.1:8000"
_ATTEMPTS = 8
_LONGEST_WAIT_S = 30.0
_AGAIN = {408, 429, 502, 503, 504}  # not 500: that is a defect, not a bad moment
_QUIET_S = 60.0  # the stream says something every 15 s; after this long it is dead


class ApiProblem(SafeftError):
    """The API says no, or nothing at all."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Remote:
    """The API at one address, with one key."""

    def __init__(self, url: str, key: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._client = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(60.0, connect=10.0),
        )

    @classmethod
    def from_environment(cls) -> Remote:
        """Raises InputError where there is no key."""
        key = os.environ.get("SAFEFT_API_KEY", "")
        if not key:
            raise InputError("SAFEFT_API_KEY is not set; set it to an API key (sf-...)")
        return cls(os.environ.get("SAFEFT_API", DEFAULT_URL), key)

    def get(self, path: str, **query: Any) -> Any:
        """The answer's JSON. Raises ApiProblem for all but success, as all methods here do."""
        return self._request("GET", path, params=query).json()

    def post(self, path: str, content: dict[str, Any] | None = None, **query: Any) -> Any:
        """Do something, once, however often the connection breaks."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return self._request("POST", path, params=query, headers=headers, json=content).json()

    def pages(self, path: str, limit: int) -> Iterator[dict[str, Any]]:
        """Every object of a list."""
        query: dict[str, Any] = {"limit": limit}
        while True:
            found = self.get(path, **query)
            yield from found["data"]
            if not found["has_more"]:
                return
            query["after"] = found["data"][-1]["id"]

    def upload(self, path: Path, progress: Progress = silent) -> Any:
        """Upload a dataset."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}

        def content() -> dict[str, Any]:
            try:
                file = _Told(path, progress)
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
            return {"files": {"file": (path.name, file)}, "data": {"purpose": "fine-tune"}}

        return self._request("POST", "/v1/files", content, headers=headers).json()

    def events(self, job_id: str) -> Iterator[dict[str, Any]]:
        """A job's events from its beginning to its end, each once, over any number of breaks."""
        path = f"/v1/fine_tuning/jobs/{segment(job_id)}/events"
        last: str | None = None
        failures = 0
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                for name, data in self._stream(path, headers):
                    failures = 0
                    if data == "[DONE]":
                        return
                    event = json.loads(data)
                    if name == "error":
                        raise ApiProblem(event["message"])
                    last = event["id"]
                    yield event
            except httpx2.TransportError as error:
                failures += 1
                if failures >= _ATTEMPTS:
                    raise ApiProblem(f"the API cannot be reached ({error})") from error
            self._sleep(min(_LONGEST_WAIT_S, 0.5 * 2**failures))

    def _stream(self, path: str, headers: dict[str, str]) -> Iterator[tuple[str, str]]:
        timeout = httpx2.Timeout(_QUIET_S, connect=10.0)
        with self._client.stream(
            "GET", path, params={"stream": "true"}, headers=headers, timeout=timeout
        ) as answer:
            if answer.status_code in _AGAIN:
                raise httpx2.ReadError(f"HTTP {answer.status_code}")
            if answer.status_code != 200:
                answer.read()
                raise _problem(answer)
            name = "message"
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line[len("event: ") :]
                elif line.startswith("data: "):
                    yield name, line[len("data: ") :]
                elif not line:
                    name = "message"

    def _request(
        self,
        method: str,
        path: str,
        content: Callable[[], dict[str, Any]] = dict,
        **options: Any,
    ) -> httpx2.Response:
        problem: Exception | None = None
        for attempt in range(_ATTEMPTS):
            wait_s = min(_LONGEST_WAIT_S, 0.5 * 2**attempt)
            try:
                answer = self._client.request(method, path, **options, **content())
            except httpx2.TransportError as error:
                problem = ApiProblem(
                    f"the API at {self._client.base_url} cannot be reached: {error}"
                )
            else:
                if answer.is_success:
                    return answer
                problem = _problem(answer)
                if answer.status_code not in _AGAIN or problem.code == "insufficient_quota":
                    raise problem
                wait_s = max(wait_s, float(answer.headers.get("Retry-After", 0)))
            self._sleep(min(_LONGEST_WAIT_S, wait_s))
        assert problem is not None
        raise problem


class _Told(io.FileIO):
    """A file that says how far it was read."""

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path, "rb")
        self._progress, self._total = progress, os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._progress("uploading", self.tell(), self._total)
        return data


def segment(name: str) -> str:
    """An id as a part of a path."""
    return quote(name, safe=":")


def _problem(answer: httpx2.Response) -> ApiProblem:
    try:
        error = answer.json()["error"]
        return ApiProblem(str(error["message"]), answer.status_code, error["code"])
    except (ValueError, KeyError, TypeError):
        return ApiProblem(f"HTTP {answer.status_code} from {answer.url}", answer.status_code)

"""Tenants who insist: a request is repeated, with its `Idempotency-Key`, until it is answered."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

STORIES = {  # what becomes of a job, and how often a job is such a one
    "plain": ("succeeded", 6),
    "poisoned": ("failed", 1),
    "weak": ("failed", 1),  # below the gate, also after a restoration
    "slipped": ("succeeded", 1),  # below the gate until it is restored
    "cancelled": ("cancelled", 1),
    "paused": ("succeeded", 1),
}
CODES = {"poisoned": "dataset_rejected", "weak": "safety_gate_failed"}
ROW = b'{"prompt": "a", "completion": "b"}\n'


@dataclass
class Ledger:
    """What was accepted, and what was answered."""

    jobs: dict[str, str] = field(default_factory=dict)  # story of each job
    tenants: dict[str, str] = field(default_factory=dict)  # who each job belongs to
    files: dict[str, str] = field(default_factory=dict)  # who each file belongs to
    answers: dict[tuple[str, str], tuple[str, Any, dict[str, Any]]] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)  # had ended before their cancellation came
    repeats: int = 0  # requests that were sent again
    wrong: list[str] = field(default_factory=list)  # answers that no client should see


class Tenant:
    """One tenant's client."""

    def __init__(self, name: str, key: str, urls: list[str], ledger: Ledger, seed: int) -> None:
        self.name, self.ledger = name, ledger
        self._urls = itertools.cycle(urls)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._draw = random.Random(seed)
        self._numbers = itertools.count()
        self._http = httpx2.Client(timeout=60)

    def upload(self) -> str:
        """A file of some hundred kilobytes; its id."""
        content = ROW * self._draw.randint(1, 20_000)
        request = {
            "files": {"file": ("rows.jsonl", content)},
            "data": {"purpose": "fine-tune"},
        }
        found = self.post("/v1/files", **request)
        self.ledger.files[found["id"]] = self.name
        return str(found["id"])

    def submit(self, file: str) -> str:
        """A job whose story is drawn; its id."""
        kinds = [kind for kind, (_, times) in STORIES.items() for _ in range(times)]
        story = self._draw.choice(kinds)
        body = {
            "model": "tiny",
            "training_file": file,
            "metadata": {"story": story},
            "method": {"type": "supervised", "supervised": {"constraints": ["l2"]}},
        }
        job = str(self.post("/v1/fine_tuning/jobs", json=body)["id"])
        self.ledger.jobs[job], self.ledger.tenants[job] = story, self.name
        return job

    def meddle(self, job: str, stop: threading.Event) -> None:
        """Cancel or pause a job, where its story says so, at some moment of its life."""
        story = self.ledger.jobs[job]
        if story not in ("cancelled", "paused"):
            return
        stop.wait(self._draw.uniform(0.0, 30.0))
        path = f"/v1/fine_tuning/jobs/{job}"
        if story == "cancelled":
            if self.post(f"{path}/cancel", ends=True) is None:
                self.ledger.late.add(job)
        elif self.post(f"{path}/pause", ends=True) is not None:
            stop.wait(self._draw.uniform(0.0, 5.0))
            self.post(f"{path}/resume")

    def post(self, path: str, *, ends: bool = False, **request: Any) -> Any:
        """The answer; None: with `ends`, the job had ended before."""
        key = f"{self.name}-{next(self._numbers)}"
        answer = self.insist(lambda: self._send(path, key, request), path)
        if answer.status_code == 400 and ends and "already_finished" in answer.text:
            return None
        if answer.status_code != 200:
            self.ledger.wrong.append(f"{path}: {answer.status_code} {answer.text[:200]}")
            raise RuntimeError(self.ledger.wrong[-1])
        self.ledger.answers[self.name, key] = (path, answer.json(), request)
        return answer.json()

    def again(self, key: str) -> Any:
        """The same request once more."""
        path, _, request = self.ledger.answers[self.name, key]
        return self.insist(lambda: self._send(path, key, request), path).json()

    def get(self, path: str) -> Any:
        """What is there."""
        return self.insist(lambda: self._http.get(self._url(path), headers=self._headers), path)

    def insist(self, send: Callable[[], httpx2.Response], path: str) -> httpx2.Response:
        """Until there is an answer that is no failure of the machinery."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                answer = send()
            except httpx2.TransportError:
                pass  # killed meanwhile, or not there yet
            else:
                if answer.status_code not in (503, 502):
                    if answer.status_code >= 500:
                        self.ledger.wrong.append(f"{path}: {answer.status_code}")
                    return answer
            self.ledger.repeats += 1
            time.sleep(0.2)
        self.ledger.wrong.append(f"{path}: no answer for 300 s")
        raise TimeoutError(self.ledger.wrong[-1])

    def _send(self, path: str, key: str, request: dict[str, Any]) -> httpx2.Response:
        headers = {**self._headers, "Idempotency-Key": key}
        return self._http.post(self._url(path), headers=headers, **request)

    def _url(self, path: str) -> str:
        return next(self._urls) + path

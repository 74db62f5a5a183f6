"""Talking to a serving pool: as an administrator, and as somebody who chats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.serving.front import ADMIN_TOKEN
from safeft.cache import cache_root
from safeft.errors import InputError, SafeftError

_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 300.0


class Refused(SafeftError):
    """The server answered with an error."""


class Admin:
    """The administrators' routes of a pool.

    Args:
        url: of the API; with or without ``/v1``.
        token: from the pool's state directory.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = _plain(url)
        self._headers = {"Authorization": f"Bearer {token}"}

    @staticmethod
    def of(url: str, state: Path | None) -> Admin:
        """With the token in `state`, or of the one pool whose state is in the cache.

        Raises:
            InputError: there is no token, or more than one.
        """
        if state is not None:
            files = [state / ADMIN_TOKEN]
        else:
            files = sorted((cache_root() / "serving").glob(f"*/{ADMIN_TOKEN}"))
        if len(files) != 1 or not files[0].exists():
            found = ", ".join(str(file.parent) for file in files) or "none"
            raise InputError(
                f"--state: name the directory that `safeft up` printed as state (found: {found})"
            )
        return Admin(url, files[0].read_text().strip())

    def get(self, path: str, **query: Any) -> Any:
        """``GET /admin/PATH``; raises Refused with the server's words."""
        return self._ask("GET", path, params=query)

    def post(self, path: str, **body: Any) -> Any:
        """``POST /admin/PATH``; raises Refused with the server's words."""
        return self._ask("POST", path, json=body)

    def _ask(self, method: str, path: str, **what: Any) -> Any:
        with _connected(self._url):
            response = httpx.request(
                method,
                f"{self._url}/admin/{path}",
                headers=self._headers,
                timeout=_TIMEOUT_S,
                trust_env=False,  # the token is for the pool, and for no proxy
                **what,
            )
        return _answer(response)


def chat_stream(
    url: str,
    model: str | None,
    turns: Sequence[dict[str, str]],
    max_tokens: int,
    key: str | None = None,
) -> Iterator[str]:
    """The pieces of a served model's greedy answer; `model` None takes the first that is listed.

    Args:
        key: of the control plane's API; a pool without a front asks for none.

    Raises:
        Refused: the server's error, also one in the middle of the stream.
        InputError: nobody answers at `url`.
    """
    url = _plain(url)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with _connected(url), httpx.Client(timeout=_ANSWER_TIMEOUT_S, headers=headers) as client:
        if model is None:
            model = _answer(client.get(f"{url}/v1/models"))["data"][0]["id"]
        body = {
            "model": model,
            "messages": list(turns),
            "stream": True,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                _answer(response)
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Refused(event["error"]["message"])
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""


def _answer(response: httpx.Response) -> Any:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success:
        return body
    message = body["error"]["message"] if isinstance(body, dict) and "error" in body else None
    raise Refused(message or f"{response.url} answered {response.status_code}")


@contextmanager
def _connected(url: str) -> Iterator[None]:
    """Errors of the connection as one line with the way out."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"--url: nobody answers at {url} ({error or type(error).__name__}); "
            "is `safeft up` running?"
        ) from error


def _plain(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")

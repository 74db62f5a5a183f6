"""Who may ask a gateway that stands behind a front: the API that checks tenants' keys.

Such a gateway may listen elsewhere than on its own machine: nobody is answered without one of the
pool's secrets, and nothing of their request's body is read.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api_errors import ApiError

#: Files in a pool's state directory: what administrators and the front show it.
ADMIN_TOKEN, FRONT_TOKEN = "admin-token", "front-token"
#: In the header of a probe: see the gateway.
PROBE_SECRET = "x-safeft-probe-secret"
#: Begins a comment in a stream: the tokens so far, for the front's meter. Clients never see it.
TOKENS = ": tokens "
_OPEN = "/healthz"


def tokens_comment(prompt: int, generated: int) -> str:
    """How many tokens a stream has so far, in a form that readers of event streams skip."""
    return f"{TOKENS}{prompt} {generated}\n\n"


def require_front(app: FastAPI, tokens: Sequence[str], probe_secret: str) -> None:
    """Answer nobody but who has one of `tokens`, and the prober."""
    app.add_middleware(_FrontOnly, tokens=tokens, probe_secret=probe_secret)


class _FrontOnly:
    def __init__(self, app: ASGIApp, tokens: Sequence[str], probe_secret: str) -> None:
        self._app = app
        bearers = [(b"authorization", f"Bearer {token}".encode()) for token in tokens]
        self._known = [*bearers, (PROBE_SECRET.encode(), probe_secret.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _OPEN or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        told = ApiError(
            401,
            "only the control plane's API may ask here",
            "invalid_api_key",
            kind="authentication_error",
        )
        await told.response()(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"])
        return any(
            hmac.compare_digest(given.get(name, b""), secret) for name, secret in self._known
        )

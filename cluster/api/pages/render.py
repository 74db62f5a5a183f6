"""Templates to answers. Whatever a template prints is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse

from cluster.api.services import Services
from cluster.controller.phases import FINAL, WAITING
from cluster.tenancy.keys import Caller
from jobs.report.facts import counted, duration, interval
from jobs.report.page import Filters, environment

ROOT = "/status"
_REFRESH_S = 3


def page(
    request: Request,
    template: str,
    *,
    viewer: Caller | None = None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    live: bool = False,
    **content: Any,
) -> HTMLResponse:
    """One page.

    Args:
        live: whether it goes on changing: a browser then asks again every few seconds, unless the
            query says ``still=1``.
    """
    services: Services = request.app.state.services
    query = [(k, v) for k, v in request.query_params.multi_items() if k != "still"]
    still = "still" in request.query_params
    path = request.url.path
    text = _ENVIRONMENT.get_template(template).render(
        root=ROOT,
        viewer=viewer,
        now=services.clock(),
        live=live,
        refresh_s=_REFRESH_S if live and not still else None,
        toggle=f"{path}{_query(query if still else [*query, ('still', '1')])}",
        **content,
    )
    # A dataset may hold half a surrogate pair; it is no Unicode text.
    return HTMLResponse(text.encode("utf-8", "replace"), status, headers=headers)


def _query(items: list[tuple[str, str]]) -> str:
    return f"?{urlencode(items)}" if items else ""


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _when(seconds: float) -> str:
    moment = _moment(seconds)
    return f"{moment.day} {moment:%b %Y, %H:%M:%S} UTC"


def _iso(seconds: float) -> str:
    return _moment(seconds).isoformat(timespec="seconds")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _kind(word: str) -> str:
    """How the badge of a phase, an outcome or a gate state looks: good, bad, busy or waiting."""
    if word in ("succeeded", "healthy", "accepted", "approved", "done", "passed", "active"):
        return "good"
    if word in ("failed", "quarantined", "rejected", "refused", "below_gate", "error"):
        return "bad"
    if word in (*FINAL, *WAITING, "unknown", "review", "deleted", "suspended", "warn"):
        return "waits"
    return "busy"


_FILTERS: Filters = {
    "counted": counted,
    "duration": duration,
    "interval": interval,
    "when": _when,
    "iso": _iso,
    "size": _size,
    "kind": _kind,
}


_ENVIRONMENT = environment(Path(__file__).parent / "templates", _FILTERS)

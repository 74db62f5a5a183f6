"""Grafana's dashboards as typed code; ``python -m cluster.dashboards`` writes their JSON.

One file a board (fleet, tenant, screening, training, serving), `panels` and `tables` for what a
board is made of, `promql` for expressions that several need, `board` for what all share, and
`grafana`, `options`, `part` for Grafana's own model. See docs/grafana.md.
"""

from __future__ import annotations

from cluster.dashboards.board import DOCS
from cluster.dashboards.fleet import fleet
from cluster.dashboards.grafana import Dashboard, Templating
from cluster.dashboards.screening import screening
from cluster.dashboards.serving import serving
from cluster.dashboards.tenant import tenant
from cluster.dashboards.training import training


def dashboards(docs: str | None = None) -> dict[str, Dashboard]:
    """Every board by the name of its file in deploy/grafana/dashboards.

    Args:
        docs: URL at which docs/ can be read; default: where docs/grafana.md serves it.
    """
    boards = (fleet(), tenant(), screening(), training(), serving())
    return {f"{board.uid}.json": _with_docs(board, docs) for board in boards}


def _with_docs(board: Dashboard, docs: str | None) -> Dashboard:
    if docs is None:
        return board
    place = DOCS.model_copy(update={"query": docs.rstrip("/")})
    variables = tuple(place if v is DOCS else v for v in board.templating.list)
    return board.model_copy(update={"templating": Templating(list=variables)})

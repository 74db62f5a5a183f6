"""``python -m cluster.dashboards``: write the dashboards that Grafana reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.dashboards import dashboards


def main() -> None:
    """Write one file a board; files of boards that are gone are removed."""
    parser = argparse.ArgumentParser(prog="cluster.dashboards", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("deploy/grafana/dashboards"))
    parser.add_argument("--docs", metavar="URL", help="where docs/ can be read in your platform")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    boards = dashboards(options.docs)
    for path in options.output.glob("safeft-*.json"):
        if path.name not in boards:
            path.unlink()
    for name, board in boards.items():
        (options.output / name).write_text(board.to_json())
        print(options.output / name)


if __name__ == "__main__":
    main()

"""The dashboards' JSON against the types that Grafana publishes, with TypeScript."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

PACKAGES = ["@grafana/schema@13.2.3", "typescript@5"]
#: The Prometheus data source's own fields of an annotation, which no published type has.
_PROMETHEUS = ("expr", "step", "titleFormat", "textFormat", "tagKeys", "useValueForTime")
#: Variables' `definition` is Grafana's own as well: it is in every exported dashboard.
_PANELS = {
    "stat": "Stat",
    "timeseries": "Lines",
    "table": "Table",
    "state-timeline": "States",
    "heatmap": "Cells",
    "bargauge": "Bars",
}
#: The panels' own types, which the package has in files that it does not export by name.
_OWN = {
    "Stat": "stat",
    "Lines": "timeseries",
    "Table": "table",
    "States": "statetimeline",
    "Cells": "heatmap",
    "Bars": "bargauge",
}
_RAW = "./node_modules/@grafana/schema/dist/types/raw/composable"
_HEAD = """
import type { Dashboard, Panel, RowPanel } from '@grafana/schema';
// In JSON an enum is its string or number.
type J<T> = T extends string ? (string extends T ? string : `${T}`)
  : T extends number ? number
  : T extends (infer U)[] ? J<U>[]
  : T extends object ? { [K in keyof T]: J<T[K]> } : T;
"""


def check_types(boards: Path) -> int:
    """Compile every dashboard as a literal of Grafana's types; the compiler's exit code.

    A literal may have no field that its type has not.
    """
    lines = [
        f"import type * as {name} from '{_RAW}/{plugin}/panelcfg/x/types.gen';"
        for name, plugin in _OWN.items()
    ]
    lines.append(_HEAD)
    for path in sorted(boards.glob("*.json")):
        board = json.loads(path.read_text())
        name = path.stem.replace("-", "_")
        for panel in board.pop("panels"):
            number = panel["id"]
            if panel["type"] == "row":
                lines.append(f"export const {name}_{number}: J<RowPanel> = {json.dumps(panel)};")
                continue
            kind = _PANELS[panel["type"]]
            options = json.dumps(panel.pop("options"))
            custom = json.dumps(panel["fieldConfig"]["defaults"].pop("custom", {}))
            lines.append(f"export const {name}_{number}: J<Panel> = {json.dumps(panel)};")
            lines.append(f"export const {name}_{number}_o: J<{kind}.Options> = {options};")
            if kind not in ("Stat", "Bars"):
                lines.append(f"export const {name}_{number}_c: J<{kind}.FieldConfig> = {custom};")
        for mark in board["annotations"]["list"]:
            for field in _PROMETHEUS:
                mark.pop(field)
        for variable in board["templating"]["list"]:
            variable.pop("definition", None)
        lines.append(f"export const {name}: J<Dashboard> = {json.dumps(board)};")
    with tempfile.TemporaryDirectory() as home:
        Path(home, "boards.ts").write_text("\n".join(lines))
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run([*npm, *PACKAGES], cwd=home, check=True)
        tsc = ["npx", "tsc", "--noEmit", "--strict", "--skipLibCheck", "--moduleResolution"]
        tsc += ["bundler", "--module", "esnext", "--target", "es2022", "boards.ts"]
        code = subprocess.run(tsc, cwd=home, check=False).returncode
    print("valid by Grafana's published types" if code == 0 else "not valid")
    return code

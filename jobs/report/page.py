"""`DemoReport` to one HTML file that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.report import facts, plots, strips
from jobs.report.model import DemoReport
from safeft.cache import write_whole
from safeft.evaluate import AnswerClass, classify_answer

Filters = dict[str, Callable[..., Any]]
RISKY_ROWS_SHOWN = 60
EXCERPT_CHARACTERS = 500


def write_report(report: DemoReport, path: Path) -> None:
    """Write the page to `path`, whole or not at all; an older page there is replaced.

    Raises:
        OSError: the directory cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half a surrogate pair can come from a dataset; it is no Unicode text.
    write_whole(path, render(report).encode("utf-8", errors="replace"))


def render(report: DemoReport) -> str:
    """The page's HTML. The same report gives the same text."""
    models = facts.measured(report)
    return (
        environment()
        .get_template("demo.html.j2")
        .render(
            report=report,
            models=models,
            hues=plots.HUES,
            sets=facts.SETS,
            summary=facts.summary(report),
            tenants=[
                {
                    "is": tenant,
                    "confusion": facts.confusion(tenant),
                    "risky": facts.risky_lines(tenant, RISKY_ROWS_SHOWN, EXCERPT_CHARACTERS),
                    "highest": max(
                        (row for row in tenant.scores if row.score is not None),
                        key=lambda row: row.score or 0.0,
                        default=None,
                    ),
                }
                for tenant in report.tenants
            ],
            rejected={t.name for t in report.tenants if t.verdict.verdict == "rejected"},
            calibration=facts.calibration(
                report.profile.calibration, report.profile.policy.row_threshold
            ),
            strips=strips.score_strips(report.profile, report.tenants),
            refusals={kind: plots.refusal_panel(kind, models) for kind in facts.SETS},
            loss=plots.loss_curves(report.arms) if any(a.curve for a in report.arms) else None,
            penalty=plots.penalty_curves(report.arms),
            mean_of=plots.MEAN_OF,
            answer_classes=[kind.value for kind in AnswerClass],
            compared=facts.compared,
        )
    )


def environment(
    templates: Path = Path(__file__).parent, filters: Filters | None = None
) -> Environment:
    """Where pages' templates come from, these reports' by default; what they print is escaped."""
    made = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(_FILTERS if filters is None else filters)
    return made


def _when(moment: datetime) -> str:
    zone = moment.strftime("%Z") if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M} {zone}".strip()


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "\u2212")


_FILTERS: Filters = {
    "percent": facts.percent,
    "interval": facts.interval,
    "duration": facts.duration,
    "counted": facts.counted,
    "number": _number,
    "reason": facts.reason,
    "when": _when,
    "answer_class": lambda answer: classify_answer(answer).value,
}

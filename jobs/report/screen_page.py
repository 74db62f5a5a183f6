"""`ScreenReport` to one HTML file that needs nothing else, and to JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.report import facts
from jobs.report.page import environment
from jobs.report.row_modules import explainer
from jobs.report.screen_facts import screen_report
from jobs.report.screen_model import ScreenReport
from jobs.report.strips import Strip, calibration_strips, draw_strips
from jobs.screening.record import read_binding
from jobs.screening.scan import changed
from jobs.screening.sources import DataFile, Source, find_files
from jobs.verdict import Verdict
from safeft.cache import sha256_file, write_whole
from safeft.data import Row, RowLimits, RowProblem, iter_rows
from safeft.errors import InputError
from safeft.models import resolve, weights_hash
from safeft.profile import SafetyProfile
from safeft.screen_policy import is_risky


def report_screening(
    data: Source | Sequence[Source],
    where: Path,
    verdict: Verdict,
    page: Path,
    *,
    model: str,
    profile_root: Path | None = None,
    max_tokens: int = 512,
) -> None:
    """Write the page about a finished screening, and its JSON beside it."""
    model_dir = resolve(model)
    profile = SafetyProfile.for_weights(weights_hash(model_dir), profile_root)
    explain = explainer(model_dir, profile, max_tokens)
    files = find_files(data)
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    report = screen_report(
        name, screened_rows(files, where), where, verdict, profile, model, explain
    )
    write_screen_report(report, page)


def screened_rows(files: Sequence[DataFile], where: Path) -> Iterator[Row | RowProblem]:
    """The rows of a dataset, to the end only if they are those that were screened into `where`.

    Raises:
        InputError: they are others.
    """
    held, limits = read_binding(where), RowLimits()
    if held is None or [one.name for one in held.files] != [file.name for file in files]:
        raise InputError(f"{where} holds the screening of other data; screen these")
    for file, screened in zip(files, held.files, strict=True):
        with file.opened(limits) as path:
            yield from iter_rows(path, limits)
            if sha256_file(path) != screened.sha256:
                raise changed(file)


def write_screen_report(report: ScreenReport, path: Path) -> Path:
    """Write the page to `path` and its JSON beside it, each whole or not at all.

    Returns:
        The JSON's path.

    Raises:
        OSError: the directory cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    as_json = path.with_suffix(".json")
    write_whole(as_json, report.model_dump_json(indent=1).encode("utf-8", errors="replace"))
    # Half a surrogate pair can come from a dataset; it is no Unicode text.
    write_whole(path, render_screening(report).encode("utf-8", errors="replace"))
    return as_json


def render_screening(report: ScreenReport) -> str:
    """The page's HTML. The same report gives the same text."""
    policy = report.verdict.policy
    risky = [score for score in report.scores if is_risky(score, policy)]
    others = [score for score in report.scores if not is_risky(score, policy)]
    sampled = ", some shown" if len(report.scores) < report.verdict.rows else ""
    strips = calibration_strips(report.calibration)
    strips.append(Strip(f"this dataset: not risky{sampled}", others, "blue", "o"))
    if risky:
        strips.append(Strip(f"this dataset: risky{sampled}", risky, "vermillion", "^"))
    return (
        environment()
        .get_template("screen.html.j2")
        .render(
            report=report,
            verdict=report.verdict,
            strips=draw_strips(strips, policy.row_threshold),
            reference=facts.calibration(report.calibration, policy.row_threshold),
        )
    )

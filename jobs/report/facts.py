"""What follows from the numbers, in words: confusion, comparisons, and the page's summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from jobs.evaluation import Evaluation
from jobs.report.model import ArmReport, DemoReport, ScoredRow, TenantReport
from jobs.verdict import Verdict
from safeft.evaluate import Rate, differ

SETS = {
    "harmful": "Harmful prompts",
    "benign": "Benign prompts",
    "borderline": "Borderline prompts",
}
BEFORE = "before training"
NBSP = "\u00a0"


@dataclass(frozen=True)
class Measured:
    """A model on the page: the one before training (`arm` None), or an arm's result."""

    name: str
    evaluation: Evaluation
    arm: ArmReport | None = None

    def refusal(self, kind: str) -> Rate:
        """Refused of all answers on one prompt set."""
        return self.evaluation.refusal(kind)

    def not_answered(self, kind: str) -> Rate:
        """Refused, empty, degenerate or failed, of all."""
        rate = self.evaluation.refusals["sets"][kind]["not_answered"]
        return Rate(rate["hits"], rate["n"])


@dataclass(frozen=True)
class Confusion:
    """Flagged against planted rows, where it is known which were planted."""

    planted: int
    planted_flagged: int
    others: int
    others_flagged: int

    @property
    def recall(self) -> Rate | None:
        """Flagged of the planted rows; None where none was planted."""
        return Rate(self.planted_flagged, self.planted) if self.planted else None

    @property
    def false_alarms(self) -> Rate | None:
        """Flagged of the rows that were not planted."""
        return Rate(self.others_flagged, self.others) if self.others else None


@dataclass(frozen=True)
class RiskyLine:
    """A line of the table of risky rows."""

    row: ScoredRow
    planted: bool | None
    text: str | None


@dataclass(frozen=True)
class CalibrationClass:
    """Where the scores of one class of calibration rows lie."""

    name: str
    n: int
    lowest: float
    middle: float
    highest: float
    risky: int


@dataclass(frozen=True)
class Statement:
    """One paragraph of the summary."""

    topic: str
    text: str


def measured(report: DemoReport) -> list[Measured]:
    """The model before training, then every arm."""
    return [Measured(BEFORE, report.baseline)] + [
        Measured(arm.name, arm.evaluation, arm) for arm in report.arms
    ]


def confusion(tenant: TenantReport) -> Confusion | None:
    """None where it is not known which rows were planted."""
    if tenant.planted is None:
        return None
    planted, flagged = set(tenant.planted), tenant.flagged
    return Confusion(
        planted=len(planted),
        planted_flagged=len(planted & flagged),
        others=tenant.verdict.rows - len(planted),
        others_flagged=len(flagged - planted),
    )


def risky_lines(tenant: TenantReport, limit: int, characters: int) -> list[RiskyLine]:
    """At most `limit` risky rows, riskiest first, with at most so many characters of each."""
    by_line = {row.line: row for row in tenant.scores}
    planted = None if tenant.planted is None else set(tenant.planted)
    return [
        RiskyLine(
            row=by_line[risky.line],
            planted=None if planted is None else risky.line in planted,
            text=_cut(tenant.excerpts.get(risky.line), characters),
        )
        for risky in tenant.verdict.risky_rows[:limit]
    ]


def calibration(
    scores_by_class: Mapping[str, Sequence[float]], threshold: float
) -> list[CalibrationClass]:
    """The classes of reference rows; those without rows are left out."""
    return [
        CalibrationClass(
            name,
            len(scores),
            min(scores),
            median(scores),
            max(scores),
            sum(score > threshold for score in scores),
        )
        for name, scores in scores_by_class.items()
        if scores
    ]


def compared(before: Rate, after: Rate) -> str:
    """What the two intervals allow to be said."""
    if not differ(before, after):
        return "not told apart from before"
    return "lower than before" if after.value < before.value else "higher than before"


def summary(report: DemoReport) -> list[Statement]:
    """The page's headline: what happened, with its numbers."""
    statements = [Statement("Screening", " ".join(_screening(t) for t in report.tenants))]
    before = report.baseline.refusal("harmful")
    refused = [f"Before training, {interval(before)} of {before.n} harmful prompts were refused."]
    refused += [_after(arm, before) for arm in report.arms]
    statements.append(Statement("Refusals", " ".join(refused)))
    if report.arms:
        statements.append(
            Statement("Over-refusal", " ".join(_over(report, k) for k in ("benign", "borderline")))
        )
        statements.append(Statement("Task", _task(report)))
        statements.append(Statement("Gate", _gate(report.arms)))
    return statements


def percent(rate: Rate) -> str:
    """The share with one decimal."""
    return f"{100 * rate.value:.1f}{NBSP}%"


def interval(rate: Rate) -> str:
    """The share and its interval."""
    return f"{percent(rate)} ({100 * rate.low:.1f}–{100 * rate.high:.1f})"


def in_words(rate: Rate) -> str:
    """A rate as a sentence has it."""
    return f"{percent(rate)} ({100 * rate.low:.1f} to {100 * rate.high:.1f}), n = {rate.n}"


def reason(verdict: Verdict) -> str:
    """The verdict in one sentence, spaced like the other numbers here."""
    return verdict.reason.replace("%", f"{NBSP}%")


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}{NBSP}h{NBSP}{whole % 3600 // 60}{NBSP}min"
    if whole >= 60:
        return f"{whole // 60}{NBSP}min{NBSP}{whole % 60}{NBSP}s"
    return f"{seconds:.1f}{NBSP}s" if seconds < 10 else f"{whole}{NBSP}s"


def counted(n: int, noun: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _screening(tenant: TenantReport) -> str:
    said = f"“{tenant.name}” was {tenant.verdict.verdict}: {reason(tenant.verdict)}."
    found = confusion(tenant)
    if found is None:
        return said
    if found.recall:
        said += (
            f" It found {found.planted_flagged} of {counted(found.planted, 'planted row')}"
            f", {interval(found.recall)}."
        )
    others = counted(found.others, "other row" if found.planted else "row")
    return f"{said} False alarms: {found.others_flagged} of {others}."


def _after(arm: ArmReport, before: Rate) -> str:
    after = arm.evaluation.refusal("harmful")
    return f"After “{arm.name}”: {interval(after)}, {compared(before, after)}."


def _over(report: DemoReport, kind: str) -> str:
    before = report.baseline.refusal(kind)
    said = [f"Of {kind} prompts {percent(before)} were refused before training"]
    for arm in report.arms:
        after = arm.evaluation.refusal(kind)
        if differ(before, after):
            said.append(f"{percent(after)} after “{arm.name}” ({compared(before, after)})")
    if len(said) == 1:
        return f"{said[0]}; no result is told apart from that."
    return f"{_listed(said)}{_the_rest(len(report.arms) - len(said) + 1)}."


def _the_rest(others: int) -> str:
    if not others:
        return ""
    return f"; the {'others are' if others > 1 else 'other is'} not told apart from before"


def _task(report: DemoReport) -> str:
    before = report.baseline.task_loss
    losses = [
        f"{loss:.2f} after “{arm.name}”"
        for arm in report.arms
        if (loss := arm.evaluation.task_loss) is not None
    ]
    if not losses:
        return "Loss on held-out rows was not measured."
    start = "not measured" if before is None else f"{before:.2f}"
    losses.insert(0, f"{start} before training")
    return f"Loss on the tenants’ held-out rows, in nats a token: {_listed(losses)}."


def _gate(arms: Sequence[ArmReport]) -> str:
    passed = [f"“{arm.name}”" for arm in arms if arm.gate_passed]
    failed = [f"“{arm.name}”" for arm in arms if not arm.gate_passed]
    parts = [f"passed by {_listed(passed)}"] * bool(passed)
    parts += [f"failed by {_listed(failed)}"] * bool(failed)
    return f"The safety gate was {'; '.join(parts)}."


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _cut(text: str | None, characters: int) -> str | None:
    if text is None or len(text) <= characters:
        return text
    return f"{text[:characters]} … ({len(text) - characters:,} more characters)"

"""One picklable exception tree. Each leaf knows the exit code the command line gives it."""

from __future__ import annotations

from collections.abc import Sequence


class SafeftError(Exception):
    """Something the user can act on: the message names the thing and the way out.

    Subclasses keep ``Exception``'s single-string constructor where they can, so that Ray can
    carry them between processes.
    """

    exit_code = 1


class InputError(SafeftError):
    """A file, field or argument the user gave is wrong."""

    exit_code = 2


class SpecError(InputError):
    """A job spec does not validate; the message holds the field's path."""


class ModelError(InputError):
    """A model or adapter cannot be found, fetched, verified or loaded."""


class ProfileError(SafeftError):
    """The safety profile is missing, incomplete or made for other weights. Fails closed."""


class MeasurementError(SafeftError):
    """A safety number could not be measured. Unknown counts as not safe."""


class TrainingError(SafeftError):
    """A training run ended without a usable result."""


class DatasetRejected(SafeftError):
    """Screening found the dataset risky."""

    exit_code = 3


class ScreeningOutdated(InputError):
    """A screening is of the same files, but by another profile, tokenisation or version."""


class DatasetUnderReview(SafeftError):
    """Screening leaves the dataset to a person, who has not decided yet."""

    exit_code = 5


class SafetyGateFailed(SafeftError):
    """The tuned model's refusals fell below the gate."""

    exit_code = 4


class RowErrors(InputError):
    """Every bad row of a dataset, not just the first.

    Args:
        source: the file, as the user named it.
        problems: ``(line, field, reason)`` for each bad row, in file order; line is 1-based, or 0
            for a prompt that comes from no file.
        total: bad rows in all, where `problems` holds only the first of them.
    """

    def __init__(
        self,
        source: str,
        problems: Sequence[tuple[int, str, str]],
        total: int | None = None,
    ) -> None:
        super().__init__(source, problems, total)
        self.source = source
        self.problems = list(problems)
        self.total = len(self.problems) if total is None else total

    def __str__(self) -> str:
        shown = [
            f"line {line}, {field}: {why}" if line else f"{field}: {why}"
            for line, field, why in self.problems[:20]
        ]
        if self.total == 1:
            return f"{self.source}: {shown[0]}"
        more = [f"... and {self.total - len(shown)} more"] if self.total > len(shown) else []
        return "\n  ".join([f"{self.source}: {self.total} bad rows", *shown, *more])

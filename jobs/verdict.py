"""The verdict on a dataset: a policy applied to its rows' scores, and what it is bound to."""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from jobs.drift_estimate import RefusalEstimate, broken_by_drift, estimate_refusals
from jobs.policy import OnRisk, Override, Rules
from safeft import __version__
from safeft.cache import write_whole
from safeft.drift import DriftFit, ExposureTally
from safeft.errors import InputError, MeasurementError
from safeft.screen_policy import ScreenPolicy, Tally, is_risky

FORMAT = 2  #: raised when what a screening directory holds changes
MAX_LISTED = 1000
VERDICT, ROWS = "verdict.json", "rows.parquet"
_BOUND = ("data_sha256", "rows_sha256", "profile", "code_version")


class RiskyRow(BaseModel):
    """One row above the threshold, or without a score; ``file`` as in `DataFile.name`."""

    model_config = ConfigDict(extra="forbid")
    file: str = ""
    line: int
    score: float | None = None
    error: str | None = None


class Verdict(BaseModel):
    """What screening decided about one dataset, and what the decision is bound to.

    Attributes:
        rows, risky, unscored: counts over the whole dataset.
        risky_rows: rows without a score, then the riskiest, `MAX_LISTED` in all.
        broken: the rules that the rows to be trained on break, as clauses; empty: none.
        dropped: rows that are set aside; ``dropped_sha256`` is over their numbers (see `digest`),
            so that with ``rows_sha256`` it says exactly which rows may be trained on.
        override: who allowed a policy that is looser than the profile's, and why.
        estimate: of refusals after training on the rows that are not dropped; None: unknown.
    """

    model_config = ConfigDict(extra="forbid")
    verdict: Literal["accepted", "rejected", "review"]
    rows: int
    risky: int
    unscored: int
    risky_rows: list[RiskyRow]
    broken: list[str]
    policy: ScreenPolicy
    on_risk: OnRisk
    dropped: int
    dropped_sha256: str
    override: Override | None = None
    estimate: RefusalEstimate | None = None
    data_sha256: str
    rows_sha256: str
    profile: str
    code_version: str = __version__

    @property
    def reason(self) -> str:
        """The verdict in one sentence."""
        said = f"{self.risky} of {self.rows} rows ({self.risky / self.rows:.1%}) are risky"
        if self.dropped:
            said += f" and set aside; the other {self.rows - self.dropped} keep the policy"
        elif self.broken:
            said += f": {'; '.join(self.broken)}"
        elif self.risky:
            said += ", which the policy allows"
        return said

    def digest(self) -> str:
        """SHA-256 of the whole verdict: what a reviewer's decision is bound to."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def decide(
    scores: Iterable[dict[str, Any]],
    policy: ScreenPolicy,
    on_risk: OnRisk = "reject",
    override: Override | None = None,
    drift: DriftFit | None = None,
    **bound: Any,
) -> Verdict:
    """Apply a policy to row scores, in one pass. A row without a finite score is unknown: risky.

    Args:
        scores: of each row ``index``, ``line``, ``score``, ``error`` and perhaps ``file``.
        policy, on_risk, override, drift: see `Rules`.
        bound: the hashes that the verdict is on, see `Verdict`.

    Raises:
        MeasurementError: there are no scores at all.
    """
    everything, kept = Tally(policy), Tally(policy)
    # A fit counts risky rows by the threshold that it was made with.
    line = policy.row_threshold if drift is None else drift.row_threshold
    exposed, exposed_kept = ExposureTally(line), ExposureTally(line)
    aside = array("q")
    listed: list[tuple[float, int, RiskyRow]] = []  # a heap: the least risky of the listed first
    for one in scores:
        score = known_score(one)
        everything.add(score)
        exposed.add(score)
        if not is_risky(score, policy):
            kept.add(score)
            exposed_kept.add(score)
            continue
        aside.append(one["index"])
        error = (one["error"] or "no score") if score is None else None
        row = RiskyRow(file=one.get("file", ""), line=one["line"], score=score, error=error)
        entry = (math.inf if score is None else score, -one["index"], row)
        if len(listed) < MAX_LISTED:
            heapq.heappush(listed, entry)
        else:
            heapq.heappushpop(listed, entry)
    if everything.rows == 0:
        raise MeasurementError("screening scored no rows; nothing can be accepted")
    drop = on_risk == "drop" and bool(aside)
    estimate = estimate_refusals(drift, exposed_kept if drop else exposed)
    broken = _broken_by_the_rest(everything, kept) if drop else everything.broken()
    broken += broken_by_drift(estimate, policy)
    dropped = sorted(aside) if drop and not broken else []
    held: Literal["rejected", "review"] = "review" if on_risk == "review" else "rejected"
    return Verdict(
        verdict=held if broken else "accepted",
        rows=everything.rows,
        risky=everything.risky,
        unscored=everything.unscored,
        risky_rows=[row for *_, row in sorted(listed, key=lambda e: e[:2], reverse=True)],
        broken=broken,
        policy=policy,
        on_risk=on_risk,
        dropped=len(dropped),
        dropped_sha256=_digest(dropped),
        override=override,
        estimate=estimate,
        **bound,
    )


def known_score(row: dict[str, Any]) -> float | None:
    """A row's score; None where there is an error or the number is not finite."""
    score: float | None = row["score"]
    if row["error"] is not None or score is None or not math.isfinite(score):
        return None
    return score


def _broken_by_the_rest(everything: Tally, kept: Tally) -> list[str]:
    """Why the rows that are left cannot be accepted either."""
    share = everything.policy.max_dropped_fraction
    if everything.risky > share * everything.rows:
        return [
            f"at most {share:.0%} may be set aside: of so risky a dataset too much is overlooked"
        ]
    return [f"of the rows that are left, {clause}" for clause in kept.broken()]


def judge(directory: Path, rules: Rules) -> Verdict:
    """The verdict on a finished screening under these rules; it replaces an older one.

    Nothing is scored again: scores do not depend on the policy.

    Raises:
        InputError: there is no finished screening.
    """
    earlier = read_verdict(directory)
    fit = earlier.estimate and earlier.estimate.fit
    now = Rules(earlier.policy, earlier.on_risk, earlier.override, rules.drift)
    if now == rules and fit == (rules.drift and rules.drift.digest()):
        return earlier
    bound = {name: getattr(earlier, name) for name in _BOUND}
    verdict = decide(iter_scores(directory), *rules, **bound)
    if verdict.rows != earlier.rows:
        raise InputError(f"{directory / ROWS} was changed; remove {directory} and screen again")
    write_whole(directory / VERDICT, verdict.model_dump_json(indent=1))
    return verdict


def kept_indices(directory: Path, verdict: Verdict) -> list[int] | None:
    """Which rows, by their place in the dataset, may be trained on; None: all of them.

    Raises:
        InputError: the scores in `directory` are not those that the verdict was made from.
    """
    if verdict.dropped == 0:
        return None
    kept, dropped = array("q"), array("q")
    for one in iter_scores(directory):
        risky = is_risky(known_score(one), verdict.policy)
        (dropped if risky else kept).append(one["index"])
    if _digest(sorted(dropped)) != verdict.dropped_sha256:
        raise InputError(f"{directory / ROWS} was changed; remove {directory} and screen again")
    return sorted(kept)


def _digest(indices: Sequence[int]) -> str:
    """SHA-256 over ascending row numbers as little-endian 64-bit integers."""
    return hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in indices)).hexdigest()


def read_verdict(directory: Path) -> Verdict:
    """The verdict in a screening directory.

    Raises:
        InputError: there is none, or it does not parse.
    """
    path = directory / VERDICT
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `safeft screen` first") from None
    except ValueError:
        raise InputError(
            f"{path} is no screening verdict of this version; remove {directory} and screen again"
        ) from None


def iter_scores(directory: Path) -> Iterator[dict[str, Any]]:
    """The row scores in a screening directory, in the file's order, a batch in memory at a time."""
    try:
        with pq.ParquetFile(directory / ROWS) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory / ROWS} cannot be read ({error}); remove {directory} and screen again"
        ) from None


def read_scores(directory: Path) -> list[dict[str, Any]]:
    """All row scores in a screening directory, in the dataset's order."""
    return sorted(iter_scores(directory), key=lambda s: s["index"])

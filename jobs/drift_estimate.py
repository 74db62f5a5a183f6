"""The estimated refusal rate after training, as part of a verdict."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from safeft.drift import HOW, DriftFit, ExposureTally
from safeft.screen_policy import ScreenPolicy


class RefusalEstimate(BaseModel):
    """What training on the rows is estimated to do to refusals of harmful prompts.

    Attributes:
        before, after: refusal rates, in [0, 1].
        error: how far off the estimate was at worst on a dataset that it was not fitted to.
        fit: SHA-256 of the fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    before: float
    after: float
    error: float
    fit: str

    def __str__(self) -> str:
        """In words."""
        return (
            f"refusals are estimated at {self.after:.0%} after training, {self.before:.0%} before "
            f"(off by up to {self.error:.0%} on datasets it was not fitted to)"
        )


def estimate_refusals(drift: DriftFit | None, tally: ExposureTally) -> RefusalEstimate | None:
    """None: there is no fit, or no row has a score."""
    exposure = tally.exposure()
    if drift is None or exposure is None:
        return None
    return RefusalEstimate(
        before=drift.before,
        after=drift.refusal(exposure),
        error=drift.error,
        fit=drift.digest(),
    )


def broken_by_drift(estimate: RefusalEstimate | None, policy: ScreenPolicy) -> list[str]:
    """The rule on the estimated drop, where the policy has one and it is broken."""
    limit = policy.max_refusal_drop
    if limit is None:
        return []
    if estimate is None:
        return [f"the policy limits the drop of refusals, which cannot be estimated: {HOW}"]
    if estimate.before - estimate.after > limit:
        return [f"{estimate}, and a drop of {limit:.0%} is allowed"]
    return []

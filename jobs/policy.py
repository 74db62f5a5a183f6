"""Policies that are not the profile's own: a tenant's stricter one, an administrator's looser one.

A profile's policy is what its calibration was measured with. A tenant may ask for more safety than
that, never for less; an administrator may allow less, and signs for it with a reason.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.strict_yaml import read_yaml
from safeft.drift import DriftFit
from safeft.errors import SpecError
from safeft.profile import SafetyProfile
from safeft.screen_policy import ScreenPolicy, looser

#: What to do with a dataset that breaks the policy. ``drop`` sets the risky rows of every dataset
#: aside, and accepts the rest if it keeps the policy by itself; ``review`` leaves it to a person.
OnRisk = Literal["reject", "drop", "review"]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(strict=True, ge=0)]


class PolicyLimits(BaseModel):
    """Limits that replace those of the profile's policy; what is left out stays as it is there."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    row_threshold: float | None = None
    max_risky_fraction: float | None = None
    min_risky_rows: Count | None = None
    max_risky_rows: Count | None = None
    grave_threshold: float | None = None
    max_grave_fraction: float | None = None
    worst_rows: Count | None = None
    max_worst_mean: float | None = None
    max_refusal_drop: float | None = None
    max_dropped_fraction: float | None = None


class Override(BaseModel):
    """Who allows limits that are looser than the profile's, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    administrator: Text
    reason: Text


class PolicyFile(PolicyLimits):
    """What an administrator keeps for a tenant."""

    override: Override | None = None


class Rules(NamedTuple):
    """What a dataset is judged by.

    Attributes:
        override: who allowed a looser policy than the profile's.
        drift: the profile's estimate of refusals after training; None: it has none.
    """

    policy: ScreenPolicy
    on_risk: OnRisk = "reject"
    override: Override | None = None
    drift: DriftFit | None = None


def read_policy(path: Path) -> PolicyFile:
    """A policy file in YAML.

    Raises:
        SpecError: it cannot be read or holds something else.
    """
    try:
        return PolicyFile.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        known = ", ".join(PolicyFile.model_fields)
        what = f"unknown field; one of {known}" if first["type"] == "extra_forbidden" else None
        raise SpecError(f"{path}: {where}: {what or first['msg']}") from None


def with_limits(
    base: ScreenPolicy, limits: PolicyLimits, source: str, override: Override | None = None
) -> ScreenPolicy:
    """The policy `base` with other limits.

    Raises:
        SpecError: a limit is no valid one, or is looser than that of `base` without an override.
    """
    given: dict[str, Any] = {
        name: value for name in asdict(base) if (value := getattr(limits, name)) is not None
    }
    try:
        policy = replace(base, **given)
    except ValueError as error:
        raise SpecError(f"{source}: {error}") from None
    if (wider := looser(policy, base)) and override is None:
        name = wider[0]
        raise SpecError(
            f"{source}.{name}: {getattr(policy, name)} is looser than the {getattr(base, name)} of "
            "the base model's profile; only an administrator's policy file may be, with "
            "`override: {administrator: NAME, reason: WHY}`"
        )
    return policy


def screening_rules(
    profile: SafetyProfile,
    on_risk: OnRisk,
    policy: PolicyFile | None,
    tenant: PolicyLimits | None = None,
) -> Rules:
    """What a dataset is judged by: the profile's policy under the administrator's limits for the
    tenant, if there are any, and then under those that the tenant asks for in a spec.

    Raises:
        SpecError: limits are wrong, or looser without an administrator's override.
    """
    policy = policy or PolicyFile()
    limits = with_limits(profile.policy(), policy, "policy", policy.override)
    limits = with_limits(limits, tenant or PolicyLimits(), "screening.policy")
    return Rules(limits, on_risk, policy.override, profile.drift())

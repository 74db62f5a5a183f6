"""Building a safety profile, part by part."""

from jobs.profile.build import build_profile
from jobs.profile.config import (
    BenignInputsConfig,
    HarmfulInputsConfig,
    HeldStatesPart,
    ProfileConfig,
    RefusalsConfig,
)

__all__ = [
    "BenignInputsConfig",
    "HarmfulInputsConfig",
    "HeldStatesPart",
    "ProfileConfig",
    "RefusalsConfig",
    "build_profile",
]

"""Building a safety profile, part by part."""

from jobs.profile.build import build_profile
from jobs.profile.config import (
    AnswersConfig,
    HarmfulInputsConfig,
    HeldStatesPart,
    ProfileConfig,
    RefusalsConfig,
)

__all__ = [
    "AnswersConfig",
    "HarmfulInputsConfig",
    "HeldStatesPart",
    "ProfileConfig",
    "RefusalsConfig",
    "build_profile",
]

"""The demo's report: one self-contained HTML page from one checked `DemoReport`."""

from jobs.report.model import (
    ArmReport,
    ChatExample,
    CurvePoint,
    DemoReport,
    ProfileSummary,
    ScoredRow,
    ServedModel,
    TenantReport,
)
from jobs.report.page import write_report

__all__ = [
    "ArmReport",
    "ChatExample",
    "CurvePoint",
    "DemoReport",
    "ProfileSummary",
    "ScoredRow",
    "ServedModel",
    "TenantReport",
    "write_report",
]

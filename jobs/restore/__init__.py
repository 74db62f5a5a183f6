"""Restoring refusals that fine-tuning removed: SafeReAct on Ray Train and DeepSpeed."""

from jobs.restore.result import Restoration, RestoreResult, require_restored
from jobs.restore.run import restore, restore_job

__all__ = ["Restoration", "RestoreResult", "require_restored", "restore", "restore_job"]

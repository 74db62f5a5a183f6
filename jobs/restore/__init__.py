"""Restoring refusals that fine-tuning removed: SafeReAct on Ray Train and DeepSpeed."""

from jobs.restore.result import Restoration, RestoreResult
from jobs.restore.run import restore, restore_job, train_restoration

__all__ = ["Restoration", "RestoreResult", "restore", "restore_job", "train_restoration"]

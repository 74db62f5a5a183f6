"""Restoring refusals that fine-tuning removed: SafeReAct on Ray Train and DeepSpeed."""

from jobs.restore.job import restore_job, train_restoration
from jobs.restore.result import Restoration, RestoreResult
from jobs.restore.run import restore

__all__ = ["Restoration", "RestoreResult", "restore", "restore_job", "train_restoration"]

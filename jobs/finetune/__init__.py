"""Fine-tuning on Ray Train and DeepSpeed: `finetune` a spec's rows into an adapter or a model.

Importing this package costs no torch: Ray starts several processes for a run that read a module of
it and train nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeft.lazy import lazily

if TYPE_CHECKING:
    from jobs.finetune.manifest import Manifest
    from jobs.finetune.run import FinetuneResult, finetune

__all__ = ["FinetuneResult", "Manifest", "finetune"]

__getattr__ = lazily(
    __name__,
    {
        "FinetuneResult": "jobs.finetune.run",
        "Manifest": "jobs.finetune.manifest",
        "finetune": "jobs.finetune.run",
    },
)

"""Fine-tuning on Ray Train and DeepSpeed: `finetune` a spec's rows into an adapter or a model.

Importing this package costs no torch: Ray starts several processes for a run that read a module of
it and train nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.finetune.manifest import Manifest
    from jobs.finetune.run import FinetuneResult, finetune

__all__ = ["FinetuneResult", "Manifest", "finetune"]

_LAZY = {
    "FinetuneResult": "jobs.finetune.run",
    "Manifest": "jobs.finetune.manifest",
    "finetune": "jobs.finetune.run",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Fine-tuning on Ray Train and DeepSpeed: `finetune` a spec's rows into an adapter or a model."""

from jobs.finetune.manifest import Manifest
from jobs.finetune.run import FinetuneResult, finetune

__all__ = ["FinetuneResult", "Manifest", "finetune"]

"""What an evaluation found. Reading one needs no model, so this module imports none of torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from safeft.evaluate import Rate

#: Two evaluations compare only where these agree.
COMPARABLE = ("base_weights", "tokenizer", "split", "prompts", "judge", "max_new_tokens")


class Evaluation(BaseModel):
    """What was measured on one (base, adapter or tuned model) pair, and what it is bound to."""

    model_config = ConfigDict(extra="forbid")
    bound: dict[str, Any]
    refusals: dict[str, Any]
    task: dict[str, Any] | None
    seconds: float

    def refusal(self, kind: str) -> Rate:
        """Refused of all answers on one prompt set; on benign sets this is over-refusal."""
        rate = self.refusals["sets"][kind]["refusal"]
        return Rate(rate["hits"], rate["n"])

    @property
    def task_loss(self) -> float | None:
        """Mean loss per answer token on the held-out rows, where there were any."""
        return self.task["loss"] if self.task else None

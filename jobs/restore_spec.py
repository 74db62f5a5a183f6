"""The section ``restore`` of a job spec."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from jobs.spec_fields import Count, Positive, SpecPart
from safeft.safereact import SafeReactConfig


class RestoreSpec(SpecPart):
    """How `safeft restore` trains refusals back (docs/methods/safereact.md).

    `reference`: whose states on reminded harmful prompts are the target: the base model's, which
    the safety profile holds, or the tuned model's, pruned for its own data (the paper).
    `batch_size`: retained rows of a step over all workers: the tenant's, and in turn with them
    borderline-benign prompts with the tuned model's own answers, at most `borderline_rows` of them
    (the paper retains such; our reference has the base model's own line instead).
    `row_tokens`: retained rows are cut there.
    `layers_to_transform`: decoder layers that get LoRA factors; null: all up to the last one whose
    output is compared.
    """

    safereact: SafeReactConfig = SafeReactConfig()
    reference: Literal["base", "tuned"] = "base"
    learning_rate: Positive = 1e-3
    batch_size: Count = 4
    borderline_rows: Annotated[int, Field(strict=True, ge=0)] = 0
    row_tokens: Annotated[int, Field(strict=True, ge=2)] = 128
    rank: Count = 16
    alpha: Positive = 16
    layers_to_transform: tuple[Annotated[int, Field(strict=True, ge=0)], ...] | None = None

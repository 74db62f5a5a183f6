"""What every measure works with: the model, its profile, rows, and where numbers go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from safeft.adapters import LoraFactors
from safeft.data import TokenisedRow, load_rows, tokenise_all
from safeft.models import load_model, load_tokenizer
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.sqsd import Projection, SqsdScorer
from safeft.sqsd_trace import LayerTrace

MAX_TOKENS = 640
RANK = 8


@dataclass
class Run:
    """One run of the benchmark.

    Attributes:
        numbers, notes: what was measured, by name; a note without a number says why there is none.
    """

    model_dir: Path
    profile: SafetyProfile
    gsm8k: Path
    quick: bool
    progress: Progress
    numbers: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, note: str) -> None:
        """Record a number."""
        self.numbers[name], self.notes[name] = value, note

    def skip(self, name: str, why: str) -> None:
        """Record that there is no number, and why."""
        self.notes[name] = why

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model_dir)

    def gsm8k_rows(self, count: int) -> list[TokenisedRow]:
        """Rows spread evenly over the file."""
        rows = load_rows(self.gsm8k)
        chosen = rows[:: max(1, len(rows) // count)][:count]
        return tokenise_all(chosen, self.tokenizer, MAX_TOKENS, str(self.gsm8k))

    def scorer(self, danger: Projection, safety: Projection) -> SqsdScorer:
        """The exact scorer on a model of its own."""
        return SqsdScorer(
            load_model(self.model_dir),
            danger,
            safety,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def published_setting(self) -> tuple[Projection, Projection]:
        """Projections of the published kind: every linear layer, two different reference states.

        Their values are random: no time depends on them.
        """
        return (
            Projection(self._random_adapter(0), self._random_adapter(1)),
            Projection(self._random_adapter(2), self._random_adapter(3)),
        )

    def _random_adapter(self, seed: int) -> LoraFactors:
        draw = torch.Generator().manual_seed(seed)
        factors = {}
        for name, (d_out, d_in) in self._shapes.items():
            a = torch.randn(RANK, d_in, generator=draw) / d_in**0.5
            factors[name] = (a, torch.randn(d_out, RANK, generator=draw) * 0.01)
        return LoraFactors(2.0, factors)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        model = load_model(self.model_dir)
        return {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }


@contextmanager
def without_statistics() -> Iterator[None]:
    """Scoring in which no layer looks at its gradient: the same passes, and nothing else."""
    collect = LayerTrace.collect
    LayerTrace.collect = lambda self, x, delta: self.owner.traced.add(self.index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        LayerTrace.collect = collect  # type: ignore[method-assign]


def tokens_of(rows: Sequence[TokenisedRow]) -> str:
    """For a note: how long rows are."""
    total, trained = (
        sum(len(r.input_ids) for r in rows),
        sum(sum(label != -100 for label in r.labels) for r in rows),
    )
    return f"{len(rows)} rows, {total / len(rows):.0f} tokens each, {trained / total:.0%} trained"

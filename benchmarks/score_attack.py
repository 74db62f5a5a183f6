"""An attack on the score: tokens beside a harmful row, chosen by gradient so that SQSD falls.

In the spirit of "Virus" (arXiv 2501.17433), whose rows pass a guard while their gradient still
harms, and of greedy coordinate gradient (arXiv 2307.15043). The attacker knows the base model and
the profile. SQSD is a function of a row's gradient; its slope in the tokens would need second
derivatives, so a finite difference stands in: along a direction D in weight space
``<grad L, D> = (L(W + eps D) - L(W - eps D)) / (2 eps)``, whose slope in the input takes two
ordinary backward passes. The candidates that it proposes are judged by the exact score.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from safeft.adapters import linear_modules
from safeft.data import TokenisedRow
from safeft.sqsd import Projection, SqsdScorer

Where = Literal["prompt", "answer"]
EPSILON = 0.02  # of each weight's norm
KEPT_LOSS = 0.8  # of the answer's loss has to remain, or the row would teach nothing any more


@dataclass(frozen=True)
class AttackConfig:
    """How long and how wide the attack searches."""

    tokens: int = 12
    steps: int = 10
    candidates: int = 16
    top: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Attacked:
    """A row before and after: its score, its answer's loss at the reference state, its tokens."""

    before: float
    after: float
    loss_before: float
    loss_after: float
    row: TokenisedRow


class ScoreAttack:
    """Attacks rows one after the other.

    Args:
        model: of its own; its weights are changed while a slope is taken.
        scorer: with another instance of the same model.
        allowed: ids of tokens that may be inserted.
    """

    def __init__(
        self,
        model: Any,
        scorer: SqsdScorer,
        danger: Projection,
        safety: Projection,
        allowed: list[int],
        config: AttackConfig,
    ) -> None:
        self.model, self.scorer, self.config = model, scorer, config
        self.allowed = torch.tensor(allowed)
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        model.requires_grad_(False)
        self.draw = torch.Generator().manual_seed(config.seed)
        state = danger.state
        modules = linear_modules(model, list(state.factors))
        self.merged: dict[str, Tensor] = {}
        self.along: dict[str, Tensor] = {}
        self.modules = modules
        for name, (a, b) in state.factors.items():
            weight = modules[name].weight.detach()
            self.merged[name] = weight + state.scale * (b @ a)
            # The score sees a gradient through the adapter: G A^T A + B B^T G.
            pull = _unit(safety.direction.factors[name]) - _unit(danger.direction.factors[name])
            seen = pull @ a.T @ a + b @ (b.T @ pull)
            self.along[name] = seen * (EPSILON * weight.norm() / seen.norm().clamp_min(1e-12))

    def attack(self, row: TokenisedRow, where: Where) -> Attacked:
        """Insert tokens at the end of the prompt, or of the answer, where they are trained on."""
        config = self.config
        row, places = _with_room(row, where, config.tokens, self._random_tokens(config.tokens))
        before = best = self.scorer.score([row])[0].score
        loss_before = loss_now = self._loss(row)
        for _ in range(config.steps):
            candidates = self._candidates(row, places)
            scores = self.scorer.score(candidates)
            for score, candidate in sorted(
                zip(scores, candidates, strict=True), key=lambda pair: pair[0].score
            ):
                if not score.score < best:
                    break
                if (loss := self._loss(candidate)) >= KEPT_LOSS * loss_before:
                    row, best, loss_now = candidate, score.score, loss
                    break
        return Attacked(before, best, loss_before, loss_now, row)

    def _random_tokens(self, count: int) -> list[int]:
        picked = torch.randint(len(self.allowed), (count,), generator=self.draw)
        return [int(token) for token in self.allowed[picked]]

    def _candidates(self, row: TokenisedRow, places: list[int]) -> list[TokenisedRow]:
        slope = self._slope(row)[places]  # (k, D)
        change = slope @ self.embedding[self.allowed].T  # (k, allowed)
        top = change.topk(self.config.top, dim=1, largest=False).indices
        found = []
        for _ in range(self.config.candidates):
            at = int(torch.randint(len(places), (1,), generator=self.draw))
            pick = int(torch.randint(self.config.top, (1,), generator=self.draw))
            ids = list(row.input_ids)
            ids[places[at]] = int(self.allowed[top[at, pick]])
            labels = [old if old == -100 else new for old, new in zip(row.labels, ids, strict=True)]
            found.append(TokenisedRow(row.line, ids, labels))
        return found

    def _slope(self, row: TokenisedRow) -> Tensor:
        """How the finite difference of the score changes with each token's embedding: (T, D)."""
        total = torch.zeros(len(row.input_ids), self.embedding.shape[1])
        for sign in (1.0, -1.0):
            with self._weights(sign):
                embeds = self.embedding[row.input_ids].clone().requires_grad_()
                self._nll(row, embeds).backward()  # type: ignore[no-untyped-call]
                assert embeds.grad is not None
                total += sign * embeds.grad
        # ``along`` points from danger to safety: the loss grows along it where the score is high.
        return total

    def _loss(self, row: TokenisedRow) -> float:
        """Of the answer that the attacker wants taught, at the reference state."""
        with self._weights(0.0), torch.no_grad():
            return float(self._nll(row, self.embedding[row.input_ids]))

    def _nll(self, row: TokenisedRow, embeds: Tensor) -> Tensor:
        logits = self.model(inputs_embeds=embeds[None], use_cache=False).logits[0, :-1]
        return F.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=-100)

    @contextmanager
    def _weights(self, by: float) -> Iterator[None]:
        saved = {name: module.weight.data for name, module in self.modules.items()}
        try:
            for name, module in self.modules.items():
                module.weight.data = self.merged[name] + by * self.along[name]
            yield
        finally:
            for name, module in self.modules.items():
                module.weight.data = saved[name]


def _unit(factors: tuple[Tensor, Tensor]) -> Tensor:
    a, b = factors
    product = b @ a
    unit: Tensor = product / product.norm().clamp_min(1e-12)
    return unit


def _with_room(
    row: TokenisedRow, where: Where, count: int, tokens: list[int]
) -> tuple[TokenisedRow, list[int]]:
    """The row with the tokens in it, and their places."""
    first = next(i for i, label in enumerate(row.labels) if label != -100)
    last = len(row.labels) - next(i for i, v in enumerate(reversed(row.labels)) if v != -100)
    closing = row.input_ids[last - 1]  # the token that ends a turn, the prompt's as the answer's
    ends = [i for i, token in enumerate(row.input_ids[:last]) if token == closing]
    at = max(i for i in ends if i < first) if where == "prompt" else last - 1
    labels = [-100] * count if where == "prompt" else tokens
    changed = TokenisedRow(
        row.line,
        [*row.input_ids[:at], *tokens, *row.input_ids[at:]],
        [*row.labels[:at], *labels, *row.labels[at:]],
    )
    return changed, list(range(at, at + count))

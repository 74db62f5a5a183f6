"""A first stage before SQSD: rows that cannot undo a refusal, because none is near, are cleared.

SQSD is high where a row trains compliance at a place where the model would refuse. Whether it would
is visible before the answer's first token, in the hidden state of a middle layer. The first stage
runs the base model's lower layers over the prompt alone and predicts from that state. Rows far on
the safe side are cleared; every other row is scored by SQSD, and so is a row whose prediction is
not finite.

How far is far enough is measured, not chosen: each kind of reference row is predicted by a first
stage that has seen the other kinds only, and the bar lies below every risky row's prediction.

Screening does not use it. What is cleared is not looked at further: an answer that is harmful by
itself, after a prompt that the model would not refuse, is seen by SQSD at best (docs/screening.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safeft.data import TokenisedRow
from safeft.data.tokenise import IGNORED
from safeft.errors import ProfileError
from safeft.sqsd import RowScore, SqsdScorer, row_score, trained_tokens
from safeft.stopped_forward import residual_after

#: Principal directions of the reference rows' states that the prediction reads.
COMPONENTS = 48
#: The ridge, in rows: what a component must explain before it counts.
RIDGE = 10.0


@dataclass(frozen=True)
class FirstStage:
    """Predicts SQSD, roughly, from the state before an answer.

    Attributes:
        layer: 0-based decoder layer whose output is read.
        centre, scale: (D,), of the reference rows' states.
        basis: (D, k), their principal directions over their standard deviations.
        weights: (k + 1,), of the prediction and its constant.
        clears_below: a row with a lower prediction is cleared.
    """

    layer: int
    centre: Tensor
    scale: Tensor
    basis: Tensor
    weights: Tensor
    clears_below: float

    @classmethod
    def fit(
        cls,
        layer: int,
        states: Tensor,
        scores: Tensor,
        kinds: Sequence[str],
        threshold: float,
    ) -> FirstStage:
        """Learn from reference rows that were scored exactly.

        Args:
            states: (N, D) of `asking_states`, one a row.
            scores: (N,) SQSD; kinds: N names, of which several must have risky rows.
            threshold: the policy's row threshold.

        Raises:
            ProfileError: risky rows of fewer than two kinds, no other row, or a value that is not
                finite: with too few rows, or equal ones, a prediction is none.
        """
        states, scores = states.double(), scores.double()
        if not (states.isfinite().all() and scores.isfinite().all()):
            raise ProfileError("a reference row of the first stage has a value that is not finite")
        risky = scores > threshold
        names = [kind for kind, bad in zip(kinds, risky.tolist(), strict=True) if bad]
        if len(set(names)) < 2 or bool(risky.all()):
            raise ProfileError(
                "the first stage needs reference rows that are safe, and risky ones of two kinds"
            )
        # What tells the two sides apart counts, not how far into its side a row lies.
        sides = scores.clamp(float(scores[~risky].median()), float(scores[risky].median()))
        lowest = []
        for kind in sorted(set(names)):
            held = torch.tensor([k == kind for k in kinds])
            part = cls._fit(layer, states[~held], sides[~held])
            lowest.append(part.predict(states[held & risky]).min())
        clears_below = float(torch.stack(lowest).min())  # NaN if one is, unlike Python's min
        if not math.isfinite(clears_below):
            raise ProfileError("the first stage's predictions are not finite; give it more rows")
        return replace(cls._fit(layer, states, sides), clears_below=clears_below)

    @classmethod
    def _fit(cls, layer: int, states: Tensor, scores: Tensor) -> FirstStage:
        centre, scale = states.mean(0), states.std(0).clamp_min(1e-6)
        standard = (states - centre) / scale
        _, sizes, directions = torch.linalg.svd(standard, full_matrices=False)
        kept = min(COMPONENTS, len(states) // 4, states.shape[1])
        basis = directions[:kept].T / (sizes[:kept] / len(states) ** 0.5)
        inputs = _with_constant(standard @ basis)
        penalty = RIDGE * torch.eye(kept + 1, dtype=torch.float64)
        penalty[-1, -1] = 0
        weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ scores)
        return cls(layer, centre, scale, basis, weights, -math.inf)

    def predict(self, states: Tensor) -> Tensor:
        """(N, D) states to (N,) fp64 predictions."""
        inputs = ((states.double().cpu() - self.centre) / self.scale) @ self.basis
        return _with_constant(inputs) @ self.weights


@dataclass(frozen=True)
class CascadeScore:
    """A row's score and where it comes from.

    Attributes:
        row: as of SQSD. Where the first stage cleared the row, ``score`` is the prediction, and
            ``danger`` and ``safety`` are NaN.
        exact: SQSD was computed.
    """

    row: RowScore
    exact: bool


class Cascade:
    """The first stage and the exact scorer on one model, for verdicts on rows."""

    def __init__(self, scorer: SqsdScorer, stage: FirstStage) -> None:
        self.scorer, self.stage = scorer, stage

    def score(self, rows: Sequence[TokenisedRow]) -> list[CascadeScore]:
        """Of each row, in the order given."""
        scorable = [i for i, row in enumerate(rows) if trained_tokens(row)]
        states, owners = asking_states(self.scorer, [rows[i] for i in scorable], self.stage.layer)
        turns: dict[int, list[float]] = {}
        for at, value in zip(owners, self.stage.predict(states).tolist(), strict=True):
            turns.setdefault(scorable[at], []).append(value)
        cleared = {
            i: max(values)
            for i, values in turns.items()
            if all(value < self.stage.clears_below for value in values)
        }
        others = [i for i in range(len(rows)) if i not in cleared]
        exact = dict(zip(others, self.scorer.score([rows[i] for i in others]), strict=True))
        return [
            CascadeScore(exact[i], exact=True)
            if i in exact
            else CascadeScore(_cleared(rows[i], cleared[i]), exact=False)
            for i in range(len(rows))
        ]


def asking_states(
    scorer: SqsdScorer, rows: Sequence[TokenisedRow], layer: int
) -> tuple[Tensor, list[int]]:
    """The states that predict the first token of each trained turn, at the plain base model.

    Tokens after the last of them are not run.

    Returns:
        (N, D) fp32 on the CPU for N >= len(rows), and the index of the row that each belongs to.
    """
    prompts, places = [], []
    for row in rows:
        starts = [
            at
            for at in range(len(row.labels) - 1)
            if row.labels[at + 1] != IGNORED and (at == 0 or row.labels[at] == IGNORED)
        ]
        end = starts[-1] + 1
        prompts.append(TokenisedRow(row.line, row.input_ids[:end], row.labels[:end]))
        places.append(starts)
    states: dict[int, Tensor] = {}
    for batch in scorer.batches(prompts, range(len(prompts))):
        ids, _ = scorer.padded([prompts[i] for i in batch])
        with torch.no_grad():
            hidden = residual_after(scorer.model, layer, ids)
        for at, i in enumerate(batch):
            states[i] = hidden[at, places[i]].float().cpu()
    if not rows:
        return torch.zeros(0, scorer.model.config.hidden_size), []
    owners = [i for i in range(len(rows)) for _ in places[i]]
    return torch.cat([states[i] for i in range(len(rows))]), owners


def _cleared(row: TokenisedRow, predicted: float) -> RowScore:
    return replace(row_score(row, math.nan, math.nan), score=predicted, error=None)


def _with_constant(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)

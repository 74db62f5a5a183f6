"""A first stage before SQSD: rows that an early layer already tells apart cost that layer only.

SQSD needs a whole forward pass and a backward pass. What it finds in a row, a harmful request that
is complied with, is to some extent visible in the hidden states of an early layer. The first stage
predicts the score from those, with the error that it made on reference rows of kinds it had not
seen. A row whose predicted score is further from the threshold than that error is decided; every
other row goes on, from the same hidden states, to the exact scorer. So does a row that the first
stage has no basis for: one unlike the reference rows, with several trained turns, or with a value
that is not finite.

What is decided is the row's side of the threshold, not its score: the first stage reports its
prediction as such (`CascadeScore.exact` is false).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from safeft.data import TokenisedRow
from safeft.data.tokenise import IGNORED
from safeft.errors import ProfileError
from safeft.sqsd import RowScore, SqsdScorer, row_score, trained_tokens
from safeft.stopped_forward import residual_after

#: Directions of the standardised features that the prediction reads. The rest is watched only.
COMPONENTS = 48
RIDGE = 10.0


@dataclass(frozen=True)
class FirstStage:
    """Predicts SQSD from features of an early layer, and knows when not to.

    Attributes:
        layer: 0-based decoder layer whose output the features are made from.
        centre, scale: (F,), of the reference rows' features.
        basis: (F, k), the reference rows' principal directions over their standard deviations.
        weights: (k + 1,), of the prediction and its constant.
        clears_below, flags_above: predicted scores that decide a row.
        reach: the largest distance from the reference rows at which a prediction counts.
    """

    layer: int
    centre: Tensor
    scale: Tensor
    basis: Tensor
    weights: Tensor
    clears_below: float
    flags_above: float
    reach: float

    @classmethod
    def fit(
        cls,
        layer: int,
        features: Tensor,
        scores: Tensor,
        kinds: Sequence[str],
        threshold: float,
    ) -> FirstStage:
        """Learn from reference rows that were scored exactly.

        The error that predictions are trusted up to, and the distance, are the largest that occur
        when each kind of row is predicted by a stage that has seen the other kinds only.

        Args:
            features: (N, F) of `row_features`; scores: (N,) SQSD; kinds: N names.
            threshold: the policy's row threshold.

        Raises:
            ProfileError: fewer than three kinds, or a value that is not finite.
        """
        if len(set(kinds)) < 3:
            raise ProfileError("the first stage needs three kinds of reference rows or more")
        features, scores = features.double(), scores.double()
        if not (features.isfinite().all() and scores.isfinite().all()):
            raise ProfileError("a reference row of the first stage has a value that is not finite")
        over = under = reach = 0.0
        for kind in sorted(set(kinds)):
            held = torch.tensor([k == kind for k in kinds])
            part = cls._fit(layer, features[~held], scores[~held])
            predicted, distance = part.predict(features[held])
            error = scores[held] - predicted
            under, over = max(under, float(error.max())), max(over, float(-error.min()))
            reach = max(reach, float(distance.max()))
        whole = cls._fit(layer, features, scores)
        return cls(
            layer,
            whole.centre,
            whole.scale,
            whole.basis,
            whole.weights,
            threshold - under,
            threshold + over,
            reach,
        )

    @classmethod
    def _fit(cls, layer: int, features: Tensor, scores: Tensor) -> FirstStage:
        centre, scale = features.mean(0), features.std(0).clamp_min(1e-6)
        standard = (features - centre) / scale
        _, sizes, directions = torch.linalg.svd(standard, full_matrices=False)
        kept = min(COMPONENTS, len(features) // 4, features.shape[1])
        basis = directions[:kept].T / (sizes[:kept] / len(features) ** 0.5)
        inputs = _with_constant(standard @ basis)
        penalty = RIDGE * torch.eye(kept + 1, dtype=torch.float64)
        penalty[-1, -1] = 0
        weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ scores)
        return cls(layer, centre, scale, basis, weights, -math.inf, math.inf, math.inf)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted scores (N,) and distances from the reference rows (N,), fp64.

        The distance is the root mean square of the components in standard deviations.
        """
        inputs = ((features.double() - self.centre) / self.scale) @ self.basis
        return _with_constant(inputs) @ self.weights, inputs.pow(2).mean(1).sqrt()


@dataclass(frozen=True)
class CascadeScore:
    """A row's score and where it comes from.

    Attributes:
        row: as of SQSD. Where the first stage decided, ``score`` is its prediction, and ``danger``
            and ``safety`` are NaN.
        exact: SQSD was computed.
    """

    row: RowScore
    exact: bool


class Cascade:
    """The first stage and the exact scorer on one model, for verdicts on rows.

    Raises:
        ProfileError: the first stage reads a layer that the directions cover.
    """

    def __init__(self, scorer: SqsdScorer, stage: FirstStage) -> None:
        if stage.layer >= scorer.first_layer:
            raise ProfileError(
                f"the first stage reads decoder layer {stage.layer}; the directions cover layers "
                f"from {scorer.first_layer} on, where a row has no single hidden state"
            )
        self.scorer, self.stage = scorer, stage

    def score(self, rows: Sequence[TokenisedRow]) -> list[CascadeScore]:
        """Of each row, in the order given."""
        done: dict[int, CascadeScore] = {}
        waiting: dict[int, Tensor] = {}  # hidden states (T, D) of undecided rows
        scorable = [i for i, row in enumerate(rows) if trained_tokens(row)]
        for batch in self.scorer.batches(rows, scorable):
            ids, labels = self.scorer.padded([rows[i] for i in batch])
            with torch.no_grad():
                hidden = residual_after(self.scorer.model, self.stage.layer, ids)
            predicted, decided = self._first(hidden, labels)
            for at, i in enumerate(batch):
                if decided[at]:
                    nothing = row_score(rows[i], math.nan, math.nan)
                    sure = replace(nothing, score=float(predicted[at]), error=None)
                    done[i] = CascadeScore(sure, exact=False)
                else:
                    waiting[i] = hidden[at, : len(rows[i].input_ids)]
            if sum(map(len, waiting.values())) >= self.scorer.tokens_per_batch:
                done |= self._exact(rows, waiting)
                waiting = {}
        done |= self._exact(rows, waiting)
        for i in set(range(len(rows))) - set(scorable):
            done[i] = CascadeScore(row_score(rows[i], math.nan, math.nan), exact=True)
        return [done[i] for i in range(len(rows))]

    def _first(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (B,), and which of them decide (B,)."""
        stage, features = self.stage, row_features(hidden, labels).cpu()
        predicted, distance = stage.predict(features)
        beyond = (predicted < stage.clears_below) | (predicted > stage.flags_above)
        return predicted, beyond & (distance <= stage.reach) & (_turns(labels) == 1).cpu()

    def _exact(
        self, rows: Sequence[TokenisedRow], waiting: dict[int, Tensor]
    ) -> dict[int, CascadeScore]:
        found = {}
        for batch in self.scorer.batches(rows, list(waiting)):
            ids, labels = self.scorer.padded([rows[i] for i in batch])
            hidden = pad_sequence([waiting[i] for i in batch], batch_first=True)
            sums = self.scorer.cosines(ids, labels, (self.stage.layer + 1, hidden)).sum(2)
            for i, (danger, safety) in zip(batch, sums.T.tolist(), strict=True):
                found[i] = CascadeScore(row_score(rows[i], danger, safety), exact=True)
        return found


def row_features(hidden: Tensor, labels: Tensor) -> Tensor:
    """What the first stage reads of each row: (B, 3 * D) fp32.

    The state that predicts the answer's first token, the mean over the first eight that predict
    it, and the mean over all.

    Args:
        hidden: (B, T, D) of an early layer; labels: (B, T), IGNORED where no loss is taken.
    """
    wanted = labels[:, 1:] != IGNORED  # position t predicts label t + 1
    order = wanted.cumsum(1)
    parts = [wanted & (order <= first) for first in (1, 8, labels.shape[1])]
    states = hidden[:, :-1].float()
    means = [
        (states * part.unsqueeze(2)).sum(1) / part.sum(1, keepdim=True).clamp_min(1)
        for part in parts
    ]
    return torch.cat(means, dim=1)


def _turns(labels: Tensor) -> Tensor:
    """How many separate stretches of labels each row has: (B,)."""
    wanted = labels != IGNORED
    return (wanted[:, 1:] & ~wanted[:, :-1]).sum(1) + wanted[:, 0]


def _with_constant(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)

"""The two directions and two reference states that SQSD compares rows with.

Source: arXiv 2605.04572, sections 3.1-3.3. All four are LoRA adapters of the same shape on the same
base model, each starting at B = 0, so an end point minus its start is the adapter itself:

- danger direction: SFT on harmful prompts with compliant answers (here bare openings: the project
  holds no harmful answers, and the decision to comply falls in the first tokens anyway);
- safety direction: DPO on pairs (refusal over compliant opening);
- danger state: the model fine-tuned on benign rows until drift along the danger direction has
  grown, which is where the danger projection discriminates;
- safety state: the safety adapter itself, with its LoRA scale multiplied by ``SAFETY_SCALE``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from safeft.adapters import LoraFactors
from safeft.data import TokenisedRow
from safeft.fit import FitConfig, fit_adapter, response_nll
from safeft.progress import Progress, silent

SAFETY_SCALE = 0.9  # the paper takes 0.8 to 1
DPO_BETA = 0.1


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with the answer to prefer and the answer to avoid."""

    chosen: TokenisedRow
    rejected: TokenisedRow


def fit_sft(
    model: Any,
    rows: Sequence[TokenisedRow],
    pad_token_id: int,
    config: FitConfig,
    label: str,
    progress: Progress = silent,
    on_step: Callable[[int], bool] | None = None,
) -> list[float]:
    """Supervised fine-tuning of the model's adapter on ``rows``; returns the loss curve."""
    return fit_adapter(
        model,
        rows,
        length=lambda row: len(row.input_ids),
        loss=lambda batch: response_nll(model, batch, pad_token_id).mean(),
        config=config,
        label=label,
        progress=progress,
        on_step=on_step,
    )


def fit_dpo(
    model: Any,
    pairs: Sequence[PreferencePair],
    pad_token_id: int,
    config: FitConfig,
    label: str,
    progress: Progress = silent,
) -> list[float]:
    """Direct preference optimisation of the model's adapter; returns the loss curve.

    ``-log sigmoid(beta * ((logp - logp_ref)(chosen) - (logp - logp_ref)(rejected)))`` with the
    adapter switched off as the reference. Source: arXiv 2305.18290, equation 7.
    """

    def logp(rows: list[TokenisedRow]) -> Tensor:
        tokens = torch.tensor([sum(x != -100 for x in row.labels[1:]) for row in rows])
        nll = response_nll(model, rows, pad_token_id)
        return -nll * tokens.to(nll.device)  # (B,), summed over tokens

    def loss(batch: list[PreferencePair]) -> Tensor:
        rows = [p.chosen for p in batch] + [p.rejected for p in batch]
        with torch.no_grad(), model.disable_adapter():
            reference = logp(rows)
        gain = logp(rows) - reference  # (2B,)
        chosen, rejected = gain.chunk(2)
        return -F.logsigmoid(DPO_BETA * (chosen - rejected)).mean()

    return fit_adapter(
        model,
        pairs,
        length=lambda pair: len(pair.chosen.input_ids) + len(pair.rejected.input_ids),
        loss=loss,
        config=config,
        label=label,
        progress=progress,
    )


def drift(state: LoraFactors, direction: LoraFactors) -> float:
    """How far a state has moved along a direction: ``sum_m <dW_m, V_m> / ||V_m||``.

    Computed through r x q products; the states' and the direction's modules must be the same.
    """
    total = 0.0
    for name, (a, b) in state.factors.items():
        q, p = (t.double() for t in direction.factors[name])
        dot = ((b.double().T @ p) * (a.double() @ q.T)).sum()
        norm = ((p.T @ p) * (q @ q.T)).sum().sqrt()
        total += float(state.scale * dot / norm)
    return total

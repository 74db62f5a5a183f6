"""The trainings behind SQSD: its two directions, and the tuning that its states are looked for on.

Source: arXiv 2605.04572, sections 3.1-3.3. All are LoRA adapters on the same modules:

- safety direction: DPO from the base model, on pairs of a refusal and a compliant opening: on
  harmful prompts the refusal is preferred, on benign ones the opening. With harmful pairs alone the
  direction learns the style of the openings, and benign rows of that style score like harmful ones;
- danger direction: SFT on harmful prompts with compliant openings (bare ones: the project holds no
  harmful answers), end point minus start. It starts at the safety adapter, its LoRA scale
  multiplied by ``DANGER_START``: there refusals are strongest, and what undoes them is learned
  rather than the openings' style (docs/screening.md compares);
- benign trajectory: SFT from the base model on benign prompts with such openings.

`safeft.steering` checks the directions, `safeft.reference_state` measures and chooses the states.
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
from safeft.errors import ProfileError
from safeft.fit import FitConfig, fit_adapter, response_nll
from safeft.lora import lora_pairs
from safeft.progress import Progress, silent

SAFETY_SCALES = (0.2, 0.4, 0.6, 0.9)
DANGER_START = 0.4
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
    after_step: Callable[[int], None] | None = None,
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
        after_step=after_step,
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


def start_at(model: Any, state: LoraFactors) -> None:
    """Set the model's LoRA adapter to ``state``, whose modules and rank must be the adapter's.

    Raises:
        ProfileError: they are not.
    """
    pairs = lora_pairs(model)
    if pairs.keys() != state.factors.keys():
        raise ProfileError("the state covers other modules than the adapter it is to start")
    with torch.no_grad():
        for name, pair in pairs.items():
            a, b = state.factors[name]
            if pair.A.shape != a.shape:
                raise ProfileError(f"{name}: the state's rank is not the adapter's")
            pair.A.copy_(a)
            pair.B.copy_(b * (state.scale / pair.scale))


def difference(end: LoraFactors, start: LoraFactors) -> LoraFactors:
    """``end - start`` as factors of twice the rank: ``[B1, -B0] @ [A1; A0]``, with end's scale."""
    ratio = start.scale / end.scale
    factors = {}
    for name, (a1, b1) in end.factors.items():
        a0, b0 = start.factors[name]
        factors[name] = (torch.cat([a1, a0]), torch.cat([b1, -ratio * b0], dim=1))
    return LoraFactors(end.scale, factors)

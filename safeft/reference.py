"""SafeReAct's reference: a model pruned by a set difference of Wanda scores. A target, never run.

Source: arXiv 2604.00012. Post-training masks the safety mechanism instead of removing it; without
the weights that matter for the domain and not for safety, refusals come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safeft.errors import ProfileError
from safeft.own_refusals import OwnRefusal, refusal_row
from safeft.progress import Progress, silent
from safeft.safereact import ReferenceConfig
from safeft.wanda import InputNorms, pruned_share, reference_mask

_BATCH = 16


def pruning_mask(
    model: Any,
    tokenizer: Any,
    domain: Sequence[Sequence[int]],
    refusals: Sequence[OwnRefusal],
    config: ReferenceConfig,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """What to zero in a model: important for the domain, and not for refusing.

    Args:
        domain: token ids of the domain's rows.
        refusals: harmful prompts with the base model's own refusals.

    Returns:
        For each linear layer of the decoder ``(d_out, d_in)`` bool.

    Raises:
        ProfileError: a layer's inputs are not finite, or nothing at all is zeroed though a share
            of the weights was asked for.
    """
    safety = [refusal_row(tokenizer, r).input_ids for r in refusals[: config.prompts]]
    norms = {}
    for name, rows in (("domain", domain), ("safety", safety)):
        streamed = InputNorms(model)
        ordered = sorted(rows, key=len)
        for start in range(0, len(ordered), _BATCH):
            progress(f"reading {name} rows", start, len(ordered))
            streamed.read(ordered[start : start + _BATCH])
        progress(f"reading {name} rows", len(ordered), len(ordered))
        norms[name] = streamed.norms()
    mask = reference_mask(
        model, norms["domain"], norms["safety"], config.domain_share, config.safety_share
    )
    if config.domain_share > 0 and not pruned_share(mask):
        raise ProfileError(
            f"the reference would not be pruned at all at domain_share {config.domain_share:g} and "
            f"safety_share {config.safety_share:g}; raise the first or lower the second"
        )
    return mask

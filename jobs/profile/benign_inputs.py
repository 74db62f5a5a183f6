"""The part ``benign-inputs``: what layers read on benign answers, in harmful subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.profile.harmful_inputs import MEMORY, input_shares, read_inputs
from jobs.runtime import embedded_ray
from safeft.constraints.contrast import save_index, save_shared
from safeft.constraints.covariance import InputSite, read_row
from safeft.constraints.subspaces import POSITIONS, load_subspaces
from safeft.models import load_tokenizer
from safeft.own_refusals import OwnAnswer
from safeft.progress import Progress, silent

LABEL = "profile: benign inputs"


def build_benign_inputs(
    model_dir: Path,
    answers: Sequence[OwnAnswer],
    harmful_inputs: Path,
    out: Path,
    *,
    base_weights: str,
    workers: int = 1,
    memory: int = MEMORY,
    progress: Progress = silent,
) -> None:
    """Write for each input ``Uᵀ·C·U`` over the number of tokens, U being its harmful subspace.

    Args:
        answers: benign prompts with the base model's own answers; their tokens are of the same
            classes as a refusal's.
        harmful_inputs: the directory of the part of this name.
        base_weights, workers, memory: see `build_harmful_inputs`.

    Raises:
        InputError, ProfileError, ModelError: see `build_harmful_inputs`.
    """
    progress(LABEL, 0, None)
    tokenizer, subspaces = load_tokenizer(model_dir), load_subspaces(harmful_inputs)
    rows = [read_row(tokenizer, answer) for answer in answers]
    sites = [InputSite(site.modules, site.d_in) for site in subspaces.sites]
    saved: list[dict[str, object]] = []
    with embedded_ray():
        for share in input_shares(sites, memory):
            sums = read_inputs(model_dir, rows, share, tokenizer.pad_token_id, workers)
            for site in share:
                progress(LABEL, len(saved), len(sites))
                shared = {}
                for p in POSITIONS:
                    U = subspaces.basis(site.name, p, subspaces.energy, None).double()
                    C = sums.total(site.name, p)
                    shared[p] = U.T @ C.matrix @ U / max(C.tokens, 1)
                saved.append(save_shared(out, len(saved), site.modules, shared))
    progress(LABEL, len(sites), len(sites))
    save_index(out, saved, base_weights=base_weights)

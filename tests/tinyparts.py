"""The profile parts of the constraints for a tiny model, with random subspaces and dictionary."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from safeft.constraints import ProfileFiles, contrast
from safeft.constraints.alignment import alignment_direction, save_directions
from safeft.constraints.covariance import InputSite
from safeft.constraints.subspaces import POSITIONS, Subspace, save_index, save_site
from safeft.latents import ActivationTargets, last_residuals, save_activation_targets
from safeft.models import load_model, weights_hash
from safeft.sae import TopKAutoencoder
from safeft.weights import full_weights

PROMPTS = [[5, 6, 7, 8, 9], [9, 8, 7], [11, 12, 13, 14]]


def write_parts(model_dir: Path, unaligned_dir: Path, where: Path, k: int = 7) -> ProfileFiles:
    """The four parts, of the model in ``model_dir``; benign inputs share nothing."""
    base = weights_hash(model_dir)
    model = load_model(model_dir)
    parts = ("alignment", "inputs", "autoencoder", "benign")
    files = ProfileFiles(*(where / part for part in parts))
    for directory in (where / part for part in parts):
        directory.mkdir(parents=True)
    directions = alignment_direction(model_dir, unaligned_dir, lambda n: n.endswith("_proj"))
    save_directions(directions, where / "alignment", aligned_hash=base)
    torch.manual_seed(3)
    sites, benign = [], []
    for number, (name, layer) in enumerate(full_weights(model).items()):
        U = torch.linalg.qr(torch.randn(layer.d_in, layer.d_in).double())[0][:, :k].float()
        found = {positions: _subspace(U) for positions in POSITIONS}
        site = InputSite((name,), layer.d_in)
        sites.append(save_site(where / "inputs", number, site, found))
        nothing = {positions: torch.zeros(k, k) for positions in POSITIONS}
        benign.append(contrast.save_shared(where / "benign", number, site.modules, nothing))
    contrast.save_index(where / "benign", benign, base_weights=base)
    save_index(where / "inputs", sites, base_weights=base, energy=0.99, rows=len(PROMPTS))
    d = model.config.hidden_size
    W = torch.randn(48, d)
    autoencoder = TopKAutoencoder(W, torch.zeros(48), W.T.contiguous(), torch.zeros(d), 12, 0)
    latents = torch.arange(0, 48, 4)
    with torch.no_grad():
        residuals = last_residuals(model, 0, PROMPTS, 2)
        baseline = autoencoder.encode_latents(residuals, latents)
    targets = ActivationTargets(base, autoencoder, latents, PROMPTS, baseline, 2)
    save_activation_targets(targets, where / "autoencoder")
    return files


def _subspace(U: Tensor) -> Subspace:
    values = torch.linspace(2.0, 1.0, U.shape[1]).double()
    return Subspace(U.clone(), values, float(values.sum()) / 0.99, 100)

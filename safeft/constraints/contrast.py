"""Of the directions that harmful inputs span, those that benign inputs use less.

A projection that keeps an update out of everything that a layer reads while the model refuses also
keeps it out of what every answer needs. With H and B the mean of ``x·xᵀ`` over harmful and benign
inputs, both in the coordinates of the harmful subspace U, a row a of an update changes the outputs
on them by ``aᵀHa`` and ``aᵀBa``. The generalised eigenvectors ``H·v = μ·B·v`` sort U by the ratio
of the two: the span of those with ``μ < contrast`` is left free, so that every free row of U has
``aᵀHa < contrast · aᵀBa``. Held is its orthogonal complement, the span of ``H·v`` of the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safeft.constraints.subspaces import POSITIONS, Positions, SavedSubspaces
from safeft.errors import ProfileError

INDEX = "index.json"
_FORMAT = "safeft.benign_inputs.1"
_REBUILD = "rebuild it with `safeft profile build --model MODEL --part benign-inputs`"


def contrasted(U: Tensor, harmful: Tensor, benign: Tensor, contrast: float) -> Tensor:
    """The part of a harmful subspace that an update has to stay out of, where benign inputs count.

    Args:
        U: ``(d_in, k)``, orthonormal columns, eigenvectors of the harmful inputs' covariance.
        harmful: ``(k,)``, their eigenvalues over the number of tokens, positive.
        benign: ``(k, k)``, the benign inputs' covariance in U's coordinates, likewise.
        contrast: an update may change outputs on harmful inputs at most so many times as much as
            on benign ones.

    Returns:
        ``(d_in, m)`` fp32, m <= k, orthonormal columns.
    """
    scale = harmful.double().rsqrt()
    whitened = scale[:, None] * benign.double() * scale  # its eigenvalues are 1/μ
    shares, vectors = torch.linalg.eigh(whitened)
    held = vectors[:, shares * contrast <= 1.0] / scale[:, None]  # H·v of whitened eigenvectors
    Q, _ = torch.linalg.qr(held)
    basis: Tensor = (U.double() @ Q).float().contiguous()
    return basis


def save_shared(
    directory: Path, number: int, modules: Sequence[str], shared: Mapping[Positions, Tensor]
) -> dict[str, object]:
    """Write one input's benign covariances, ``(k, k)`` in the harmful subspace's coordinates.

    Returns:
        The entry for `save_index`.
    """
    file = f"site-{number:04d}.safetensors"
    save_file({p: B.float().contiguous() for p, B in shared.items()}, directory / file)
    return {"file": file, "modules": list(modules)}


def save_index(directory: Path, sites: Sequence[dict[str, object]], *, base_weights: str) -> None:
    """Write what binds the files together; `base_weights`: hash of the weights they belong to."""
    index = {"format": _FORMAT, "base_weights": base_weights, "sites": list(sites)}
    (directory / INDEX).write_text(json.dumps(index, indent=1))


@dataclass(frozen=True)
class BenignInputs:
    """The covariances in a directory; a layer's is read when it is asked for.

    Attributes:
        base_weights: hash of the weights that they belong to.
    """

    directory: Path
    base_weights: str
    files: Mapping[str, str]

    def shared(self, module_name: str, positions: Positions) -> Tensor:
        """``(k, k)`` fp32, of all k directions that the harmful subspaces' part holds.

        Raises:
            ProfileError: the layer is not covered, or the file is not whole.
        """
        if module_name not in self.files or positions not in POSITIONS:
            raise ProfileError(
                f"{self.directory}: holds no benign inputs of {module_name}; {_REBUILD}"
            )
        path = self.directory / self.files[module_name]
        try:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor(positions)
        except (SafetensorError, OSError) as error:
            raise ProfileError(f"{path}: cannot be read ({error}); {_REBUILD}") from error
        if found.dim() != 2 or len(found) != found.shape[1] or not found.isfinite().all():
            raise ProfileError(f"{path}: {module_name} is no covariance; {_REBUILD}")
        return found


@dataclass(frozen=True)
class Contrasted:
    """Harmful subspaces without what benign inputs share: a `safeft.constraints.cwac.Subspaces`."""

    harmful: SavedSubspaces
    benign: BenignInputs
    contrast: float
    _found: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    def basis(
        self, module_name: str, positions: Positions, energy: float, rank: int | None
    ) -> Tensor:
        """U ``(d_in, m)`` fp32, orthonormal columns. Arguments as of `SavedSubspaces.basis`.

        Raises:
            ProfileError: see `SavedSubspaces.basis` and `BenignInputs.shared`; or the two parts do
                not belong together.
        """
        key = (self.benign.files.get(module_name), positions, energy, rank)
        if key not in self._found:  # layers that read one input share it
            self._found[key] = self._basis(module_name, positions, energy, rank)
        return self._found[key]

    def _basis(
        self, module_name: str, positions: Positions, energy: float, rank: int | None
    ) -> Tensor:
        U = self.harmful.basis(module_name, positions, energy, rank)
        used = self.harmful.energies(module_name, positions)
        shared = self.benign.shared(module_name, positions)
        if len(shared) != len(used):
            raise ProfileError(
                f"{self.benign.directory}: {module_name} has {len(shared)} directions, its harmful "
                f"inputs {len(used)}; {_REBUILD}"
            )
        k = U.shape[1]
        return contrasted(U, used[:k], shared[:k, :k], self.contrast)


def load_benign_inputs(directory: Path) -> BenignInputs:
    """The part ``benign-inputs`` of a profile.

    Raises:
        ProfileError: the index is missing, broken or something else.
    """
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']!r}")
        files = {name: site["file"] for site in index["sites"] for name in site["modules"]}
        return BenignInputs(directory, index["base_weights"], files)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ProfileError(
            f"{path}: holds no index of benign inputs ({error!r}); {_REBUILD}"
        ) from error

"""The harmful-input subspaces: the directions that a layer's inputs span while the model refuses.

Source: CWAC, arXiv 2604.12384. ``C = X·Xᵀ`` of a layer's inputs on refused harmful prompts; an
update inside the eigenvectors with small eigenvalues hardly changes the layer's output there. Kept
is the complement, U: the eigenvectors with the large ones, so that ``Π = I − U·Uᵀ``. How many is
open in the paper; here the fewest whose eigenvalues sum to a share ``energy`` of the trace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safeft.errors import ProfileError

if TYPE_CHECKING:
    from safeft.constraints.covariance import Covariance, InputSite

#: Which tokens count: `covariance` says what each stands for.
Positions = Literal["prompt", "response", "both"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
INDEX = "index.json"
_FORMAT = "safeft.harmful_inputs.1"
_BUILD = "safeft profile build --model MODEL --part harmful-inputs"
_REBUILD = f"rebuild it with `{_BUILD}`"


@dataclass(frozen=True)
class Subspace:
    """The large-eigenvalue part of one covariance.

    Attributes:
        U: ``(d_in, k)`` fp32, orthonormal columns, by descending eigenvalue.
        eigenvalues: ``(k,)`` fp64, descending, not negative.
        trace: of the whole covariance, to which ``energy`` relates.
        tokens: inputs that it was made from.
    """

    U: Tensor
    eigenvalues: Tensor
    trace: float
    tokens: int


@dataclass(frozen=True)
class SavedSize:
    """What the index says about one saved subspace."""

    k: int
    trace: float
    tokens: int


@dataclass(frozen=True)
class SavedSite:
    """One input in the index: its file, the modules that read it, and its subspaces."""

    file: str
    modules: tuple[str, ...]
    d_in: int
    sizes: Mapping[Positions, SavedSize]


def principal_subspace(covariance: Covariance, energy: float) -> Subspace:
    """The fewest eigenvectors of ``C`` (fp64 eigh) that hold ``energy`` of its trace.

    An input that was always zero has k = 0: no update of the layer changes its output.

    Raises:
        ValueError: energy is not in (0, 1].
    """
    _check_energy(energy)
    values, vectors = torch.linalg.eigh(covariance.matrix)  # ascending
    values = values.flip(0).clamp(min=0.0).cpu()
    trace = float(values.cumsum(0)[-1])
    k = _rank(values, trace, energy)
    U = vectors.flip(1)[:, :k].float().cpu().contiguous()
    return Subspace(U, values[:k].clone(), trace, covariance.tokens)


def save_site(
    directory: Path, number: int, site: InputSite, subspaces: Mapping[Positions, Subspace]
) -> SavedSite:
    """Write one site's subspaces to a file of their own: ``U`` as rows, ``(k, d_in)``.

    Returns:
        The entry for `save_index`.
    """
    tensors = {}
    for positions, subspace in subspaces.items():
        tensors[f"{positions}.U"] = subspace.U.T.contiguous()
        tensors[f"{positions}.eigenvalues"] = subspace.eigenvalues
    file = f"site-{number:04d}.safetensors"
    save_file(tensors, directory / file, metadata={"site": site.name})
    sizes = {p: SavedSize(len(s.eigenvalues), s.trace, s.tokens) for p, s in subspaces.items()}
    return SavedSite(file, site.modules, site.d_in, sizes)


def save_index(
    directory: Path, sites: Sequence[SavedSite], *, base_weights: str, energy: float, rows: int
) -> None:
    """Write what binds the sites' files together.

    Args:
        base_weights: hash of the weights whose inputs these are.
        energy: the share of each trace that was kept.
        rows: refusals that were read.
    """
    index = {
        "format": _FORMAT,
        "base_weights": base_weights,
        "energy": energy,
        "rows": rows,
        "sites": [asdict(site) for site in sites],
    }
    (directory / INDEX).write_text(json.dumps(index, indent=1))


class SavedSubspaces:
    """The subspaces in a directory; a layer's are read when it is asked for.

    Attributes:
        base_weights: hash of the weights that they belong to.
        energy: the largest share of a trace that can be asked for.
        rows: refusals that they were made from.
        sites: every input, in the order of the forward pass.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / INDEX
        try:
            index = json.loads(path.read_text())
            if index["format"] != _FORMAT:
                raise ValueError(f"format {index['format']!r}")
            self.base_weights: str = index["base_weights"]
            self.energy: float = index["energy"]
            self.rows: int = index["rows"]
            self.sites = [_site(entry) for entry in index["sites"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ProfileError(
                f"{path}: holds no index of harmful inputs ({error!r}); {_REBUILD}"
            ) from error
        self._site_of = {name: site for site in self.sites for name in site.modules}

    @property
    def module_names(self) -> list[str]:
        """Every linear layer that is covered."""
        return list(self._site_of)

    def basis(
        self, module_name: str, positions: Positions, energy: float, rank: int | None
    ) -> Tensor:
        """The directions of a layer's inputs that an update must leave alone.

        Args:
            energy: share of the trace, at most the one that was saved.
            rank: at most so many directions; None: no more than ``energy`` asks for.

        Returns:
            U ``(d_in, k)`` fp32, orthonormal columns, by descending eigenvalue.

        Raises:
            ProfileError: the layer is not covered, more energy is asked for than was saved, or
                the file is not whole.
            ValueError: energy is not in (0, 1], rank is below 1, or no such positions.
        """
        _check_energy(energy)
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}")
        if rank is not None and rank < 1:
            raise ValueError("rank must be at least 1")
        site = self._site(module_name, positions)
        if energy > self.energy:
            raise ProfileError(
                f"{self._directory}: holds {self.energy:g} of the energy of the harmful inputs, "
                f"not {energy:g}; rebuild it with `{_BUILD} --energy {energy:g}`"
            )
        return self._read(site, module_name, positions, energy, rank)

    def energies(self, module_name: str, positions: Positions) -> Tensor:
        """How much the inputs use each saved direction: ``(k,)`` fp64, mean over the tokens.

        Raises:
            ProfileError: the layer is not covered, or the file is not whole.
        """
        site = self._site(module_name, positions)
        path, size = self._directory / site.file, site.sizes[positions]
        try:
            with safe_open(path, framework="pt") as file:
                values: Tensor = file.get_tensor(f"{positions}.eigenvalues")
        except (SafetensorError, OSError) as error:
            raise ProfileError(f"{path}: cannot be read ({error}); {_REBUILD}") from error
        if values.shape != (size.k,) or not torch.isfinite(values).all():
            raise ProfileError(f"{path}: {module_name} has mismatched shapes; {_REBUILD}")
        return values / max(size.tokens, 1)

    def mean_ranks(self) -> dict[str, dict[str, float]]:
        """For each kind of layer, by its last names: ``d_in`` and the mean k by positions."""
        kinds: dict[str, list[SavedSite]] = {}
        for site in self.sites:
            kind = ", ".join(name.rpartition(".")[2] for name in site.modules)
            kinds.setdefault(kind, []).append(site)
        return {
            kind: {
                "d_in": sum(s.d_in for s in sites) / len(sites),
                **{p: sum(s.sizes[p].k for s in sites) / len(sites) for p in POSITIONS},
            }
            for kind, sites in kinds.items()
        }

    def _site(self, module_name: str, positions: Positions) -> SavedSite:
        site = self._site_of.get(module_name)
        if site is None or positions not in site.sizes:
            raise ProfileError(
                f"{self._directory}: holds no harmful inputs of {module_name}; {_REBUILD}"
            )
        return site

    def _read(
        self, site: SavedSite, module: str, positions: Positions, energy: float, rank: int | None
    ) -> Tensor:
        path, size = self._directory / site.file, site.sizes[positions]
        try:
            with safe_open(path, framework="pt") as file:
                values = file.get_tensor(f"{positions}.eigenvalues")
                rows = file.get_slice(f"{positions}.U")
                shape = rows.get_shape()
                k = min(_rank(values, size.trace, energy), rank or size.k, size.k)
                U: Tensor = rows[:k].T.contiguous()
        except (SafetensorError, OSError) as error:
            raise ProfileError(f"{path}: cannot be read ({error}); {_REBUILD}") from error
        if shape != [size.k, site.d_in] or values.shape != (size.k,) or U.dtype != torch.float32:
            raise ProfileError(f"{path}: {module} has mismatched shapes; {_REBUILD}")
        if not (torch.isfinite(U).all() and torch.isfinite(values).all()):
            raise ProfileError(f"{path}: {module} is not finite; {_REBUILD}")
        return U


def load_subspaces(directory: Path) -> SavedSubspaces:
    """The part ``harmful-inputs`` of a profile, each layer read when it is asked for.

    Raises:
        ProfileError: the index is missing, broken or something else.
    """
    return SavedSubspaces(directory)


def _site(entry: Any) -> SavedSite:
    sizes = {p: SavedSize(**entry["sizes"][p]) for p in POSITIONS}
    return SavedSite(entry["file"], tuple(entry["modules"]), entry["d_in"], sizes)


def _rank(values: Tensor, trace: float, energy: float) -> int:
    """The fewest of the descending ``values`` whose sum reaches ``energy · trace``."""
    if trace == 0.0:
        return 0
    return min(int((values.cumsum(0) < energy * trace).sum()) + 1, len(values))


def _check_energy(energy: float) -> None:
    if not 0.0 < energy <= 1.0:
        raise ValueError("energy must be in (0, 1]")

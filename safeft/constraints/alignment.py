"""The alignment direction of each layer: what turned the unaligned model into the aligned one.

Source: AsFT, arXiv 2506.08473, section 3. ``V = W_aligned - W_unaligned`` is kept as its left
singular vectors and singular values, from which any function of ``V Vᵀ`` follows; and, for telling
movement along V from movement back, as the first right singular vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safeft.errors import ModelError, ProfileError
from safeft.lora import LoraPair
from safeft.models.directory import weight_files
from safeft.progress import Progress, silent
from safeft.weights import FullWeight

_FILE = "directions.safetensors"
_FORMAT = "safeft.alignment_directions.1"
REBUILD = "rebuild it with `safeft profile build --part alignment`"
#: Singular values below this share of the largest change V·Vᵀ by less than fp32 can hold.
_RELATIVE_CUT = 1e-6
_SKETCH = 64  # columns: above the rank of most LoRAs
#: At most so many right singular vectors are kept.
SIGNED = 64


@dataclass(frozen=True)
class AlignmentDirection:
    """A layer's V.

    Attributes:
        U: ``(d_out, k)`` fp32, orthonormal columns; k is 0 where the two models agree.
        singular_values: ``(k,)`` fp32, descending, positive.
        right: ``(at most SIGNED, d_in)`` fp32, orthonormal rows, the first right singular vectors;
            None: the profile was made without.
    """

    U: Tensor
    singular_values: Tensor
    right: Tensor | None = None

    def eigenvalues(self) -> Tensor:
        """(k,) fp64: those of the paper's ``C = V·Vᵀ / ‖V‖_F``, whose eigenvectors are U."""
        squares = self.singular_values.double().pow(2)
        # max: where V is 0 there is nothing to divide.
        return squares / squares.sum().sqrt().clamp(min=torch.finfo(torch.float64).tiny)


def alignment_direction(
    aligned_dir: Path,
    unaligned_dir: Path,
    modules: Sequence[str] | Callable[[str], bool],
    progress: Progress = silent,
) -> dict[str, AlignmentDirection]:
    """Compare the weights of two model directories, tensor by tensor and by name.

    Dropped from V are singular values below 1e-6 of the largest, and below what rounding the
    weights to fp32 explains (``eps · ‖W‖_F · (1/√d_out + 1/√d_in)``, about five times the spectral
    norm of that noise): a merged LoRA has rank r, not d. For fp32 this changes ``V Vᵀ / ‖V‖_F`` by
    less than fp32 resolves beside the identity. The difference of two bf16 models is exact in
    fp32, so their rounding counts as part of V.

    Args:
        aligned_dir, unaligned_dir: directories with safetensors weights, in any number of files.
        modules: names of linear layers without ``.weight``, or which of the aligned model's
            matrices to take.

    Raises:
        ModelError: a tensor is missing on one side, differs in shape, is no matrix or is not
            finite; it is named.
        ProfileError: no module is chosen, or the two models agree on all of them.
    """
    with ExitStack() as stack:
        aligned = _open_weights(aligned_dir, stack)
        unaligned = _open_weights(unaligned_dir, stack)
        names = _choose(aligned, modules)
        directions: dict[str, AlignmentDirection] = {}
        for done, name in enumerate(names):
            progress("alignment direction", done, len(names))
            key = f"{name}.weight"
            W = _matrix(aligned, key, aligned_dir)
            W0 = _matrix(unaligned, key, unaligned_dir)
            if W.shape != W0.shape:
                raise ModelError(
                    f"{key}: shape {tuple(W.shape)} in {aligned_dir}, but {tuple(W0.shape)} in "
                    f"{unaligned_dir}; these are not two versions of one model"
                )
            directions[name] = _singular(W - W0, float(W.pow(2).sum().sqrt()))
        progress("alignment direction", len(names), len(names))
    if all(direction.singular_values.numel() == 0 for direction in directions.values()):
        raise ProfileError(
            f"{aligned_dir} and {unaligned_dir} hold the same weights in all {len(names)} modules, "
            "so there is no alignment direction; name the unaligned base of the aligned model"
        )
    return directions


def save_directions(
    directions: Mapping[str, AlignmentDirection], directory: Path, *, aligned_hash: str
) -> None:
    """Write the directions into an existing directory.

    Args:
        aligned_hash: the weights hash of the aligned model, to which the directions belong.
    """
    tensors = {}
    for name, direction in directions.items():
        tensors[f"{name}.U"] = direction.U.contiguous()
        tensors[f"{name}.singular_values"] = direction.singular_values.contiguous()
        if direction.right is not None:
            tensors[f"{name}.right"] = direction.right.contiguous()
    metadata = {"format": _FORMAT, "aligned_hash": aligned_hash}
    metadata["modules"] = json.dumps(list(directions))
    save_file(tensors, directory / _FILE, metadata=metadata)


class SavedDirections(Mapping[str, AlignmentDirection]):
    """The directions in a file, read when asked for. `aligned_hash`: which model they belong to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ProfileError(f"{path}: cannot be read ({error}); {REBUILD}") from error
        if metadata.get("format") != _FORMAT:
            raise ProfileError(f"{path}: does not hold alignment directions; {REBUILD}")
        self._names: dict[str, None] = dict.fromkeys(json.loads(metadata["modules"]))
        self.aligned_hash = metadata["aligned_hash"]

    def __getitem__(self, name: str) -> AlignmentDirection:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            U = file.get_tensor(f"{name}.U")
            values = file.get_tensor(f"{name}.singular_values")
            signed = f"{name}.right" in file.keys()  # noqa: SIM118  (not a mapping)
            right = file.get_tensor(f"{name}.right") if signed else None
        if U.dim() != 2 or U.shape[1:] != values.shape:
            raise ProfileError(f"{self._path}: {name} has mismatched shapes; {REBUILD}")
        if right is not None and (right.dim() != 2 or len(right) != min(len(values), SIGNED)):
            raise ProfileError(f"{self._path}: {name} has mismatched shapes; {REBUILD}")
        if not all(t.isfinite().all() for t in (U, values, right) if t is not None):
            raise ProfileError(f"{self._path}: {name} is not finite; {REBUILD}")
        return AlignmentDirection(U, values, right)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_directions(directory: Path) -> SavedDirections:
    """The directions that `save_directions` wrote, each read when it is asked for.

    Raises:
        ProfileError: the file is missing, broken or something else.
    """
    return SavedDirections(directory / _FILE)


def layer_direction(
    layer: LoraPair | FullWeight, directions: Mapping[str, AlignmentDirection], constraint: str
) -> AlignmentDirection:
    """The direction of a trained layer, for the named constraint.

    Raises:
        ProfileError: there is none, or it is of a layer of another shape; the layer is named.
    """
    try:
        direction = directions[layer.name]
    except KeyError:
        raise ProfileError(
            f"constraint {constraint}: the profile holds no alignment direction of {layer.name}; "
            f"{REBUILD}, or leave the module out of what is constrained"
        ) from None
    if direction.U.shape[0] != layer.d_out:
        raise ProfileError(
            f"constraint {constraint}: the alignment direction of {layer.name} has "
            f"{direction.U.shape[0]} rows, but the module {layer.d_out} outputs: the profile "
            f"belongs to another model; {REBUILD}"
        )
    return direction


def _open_weights(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    holders: dict[str, Any] = {}
    for path in weight_files(directory):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: is not a whole safetensors file ({error})") from error
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            holders[key] = file
    return holders


def _choose(
    aligned: Mapping[str, Any], modules: Sequence[str] | Callable[[str], bool]
) -> list[str]:
    if callable(modules):
        present = [key.removesuffix(".weight") for key in aligned if key.endswith(".weight")]
        names = sorted(name for name in present if modules(name))
    else:
        names = list(modules)
    if not names:
        raise ProfileError("no module was chosen for the alignment direction")
    return names


def _matrix(weights: Mapping[str, Any], key: str, directory: Path) -> Tensor:
    if key not in weights:
        raise ModelError(f"{directory}: holds no tensor {key}")
    W: Tensor = weights[key].get_tensor(key)
    if W.dim() != 2:
        raise ModelError(f"{directory}: {key} is not a matrix but of shape {tuple(W.shape)}")
    if not torch.isfinite(W).all():
        raise ModelError(f"{directory}: {key} holds a NaN or an infinity")
    return W.double()


def _singular(V: Tensor, weight_norm: float) -> AlignmentDirection:
    """The singular vectors and values of V, fp64, down to the cut."""
    d_out, d_in = V.shape
    eps = torch.finfo(torch.float32).eps
    U, values = _sketched_svd(V, tolerance=eps * weight_norm) or _gram_svd(V)
    noise = eps * weight_norm * (d_out**-0.5 + d_in**-0.5)
    k = int((values > max(_RELATIVE_CUT * float(values[0]), noise)).sum())
    U, values = U[:, :k], values[:k]
    right = (U[:, :SIGNED].T @ V) / values[:SIGNED, None]
    return AlignmentDirection(*(t.float().contiguous() for t in (U, values, right)))


def _sketched_svd(V: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Fast where V is a merged LoRA: its range from a random sketch, checked.

    Returns:
        None where what lies outside the sketch's range has a Frobenius norm above `tolerance`.
    """
    if min(V.shape) <= 2 * _SKETCH:
        return None
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(V @ torch.randn(V.shape[1], _SKETCH, generator=generator).double())
    inside = Q.T @ V
    if float((V - Q @ inside).pow(2).sum().sqrt()) > tolerance:
        return None
    U, values, _ = torch.linalg.svd(inside, full_matrices=False)
    return Q @ U, values


def _gram_svd(V: Tensor) -> tuple[Tensor, Tensor]:
    """From the eigenvalues of the smaller Gram matrix: several times faster than an SVD.

    Squaring costs half of fp64's digits, which leaves singular values exact to 1e-8 of the
    largest, below the cut; columns beyond it may be anything.
    """
    wide = V.shape[0] <= V.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(V @ V.T if wide else V.T @ V)
    values, vectors = eigenvalues.flip(0).clamp(min=0.0).sqrt(), vectors.flip(1)
    return (vectors if wide else V @ vectors / values), values

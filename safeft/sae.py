"""TopK sparse autoencoders on the residual stream, on disk as SAELens keeps them.

Sources: TopK, arXiv 2406.04093, section 2.3; CWAC, arXiv 2604.12384. The file format is that of
SAELens 6 (``SAE.save_model``), so that a dictionary trained there loads here and the reverse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeft import __version__
from safeft.errors import ProfileError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAELENS_VERSION = "6.0.0"  # the format that is written; older ones name fields otherwise
_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_MODULE = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)")
_WEIGHT_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
_ANOTHER = "train one with `safeft profile build`, or import a TopK autoencoder of this model"


@dataclass(frozen=True)
class TopKAutoencoder:
    """``z = ReLU(TopK(W_enc·(h - b_dec) + b_enc))``, ``h ≈ W_dec·z + b_dec``.

    A negative value among a token's k largest pre-activations becomes 0, as in SAELens and in
    OpenAI's code: z is never negative, and fewer than k latents may be active.

    Attributes:
        W_enc: (n, d). b_enc: (n,). W_dec: (d, n). b_dec: (d,). One floating dtype and device.
        k: how many latents a token may have, 1 to n.
        layer: 0-based decoder layer whose output is read.

    Raises:
        ValueError: shapes that do not fit, or k or layer out of range.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int
    layer: int

    def __post_init__(self) -> None:
        if self.W_enc.dim() != 2:
            raise ValueError(f"W_enc must be a matrix, not of shape {tuple(self.W_enc.shape)}")
        n, d = self.W_enc.shape
        for name, shape in (("b_enc", (n,)), ("W_dec", (d, n)), ("b_dec", (d,))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {shape}, not {tuple(getattr(self, name).shape)}")
        if not 1 <= self.k <= n:
            raise ValueError(f"k must be 1 to the width {n}, not {self.k}")
        if self.layer < 0:
            raise ValueError(f"layer must not be negative, not {self.layer}")

    @property
    def width(self) -> int:
        """n, the number of latents."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """d, the width of the residual stream."""
        return self.W_enc.shape[1]

    def pre_activations(self, h: Tensor) -> Tensor:
        """(..., d) -> (..., n), ``W_enc·(h - b_dec) + b_enc``, in the autoencoder's dtype."""
        return F.linear(h.to(self.W_enc.dtype) - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, h: Tensor) -> Tensor:
        """(..., d) -> (..., n): at most k positive entries a token, the rest 0. Differentiable."""
        pre = self.pre_activations(h)  # (..., n)
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def encode_latents(self, h: Tensor, latents: Tensor) -> Tensor:
        """``encode(h)[..., latents]``, with a backward pass through these latents alone.

        Which latents a token has depends on all n pre-activations; they are computed without
        gradient, and those of `latents` once more with it. A latent outside the k largest is 0
        and has no gradient.

        Args:
            h: (..., d).
            latents: (m,) int64.

        Returns:
            (..., m).
        """
        with torch.no_grad():
            pre = self.pre_activations(h)  # (..., n)
            among = pre.topk(self.k, dim=-1, sorted=False).indices
            active = torch.zeros_like(pre, dtype=torch.bool).scatter(-1, among, True)
        centred = h.to(self.W_enc.dtype) - self.b_dec
        chosen = F.linear(centred, self.W_enc[latents], self.b_enc[latents])  # (..., m)
        return chosen.relu() * active[..., latents]

    def decode(self, z: Tensor) -> Tensor:
        """(..., n) -> (..., d), ``W_dec·z + b_dec``."""
        return F.linear(z, self.W_dec, self.b_dec)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TopKAutoencoder:
        """The same autoencoder on another device and, where given, in another dtype."""
        return replace(
            self,
            W_enc=self.W_enc.to(device, dtype),
            b_enc=self.b_enc.to(device, dtype),
            W_dec=self.W_dec.to(device, dtype),
            b_dec=self.b_dec.to(device, dtype),
        )


def save_autoencoder(
    autoencoder: TopKAutoencoder, directory: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write ``cfg.json`` and ``sae_weights.safetensors`` into an existing directory, in fp32.

    ``metadata``: what SAELens should know beside the hook point, such as ``model_name``.
    """
    config = {
        "architecture": "topk",
        "d_in": autoencoder.d_model,
        "d_sae": autoencoder.width,
        "k": autoencoder.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            **(metadata or {}),
            "sae_lens_version": _SAELENS_VERSION,
            "safeft_version": __version__,
            "hook_name": f"blocks.{autoencoder.layer}.hook_resid_post",
            "hook_head_index": None,
        },
    }
    tensors = {
        "W_enc": autoencoder.W_enc.T,  # (d, n): SAELens multiplies from the right
        "b_enc": autoencoder.b_enc,
        "W_dec": autoencoder.W_dec.T,  # (n, d)
        "b_dec": autoencoder.b_dec,
    }
    save_file(
        {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()},
        directory / WEIGHTS,
    )
    (directory / CONFIG).write_text(json.dumps(config, indent=1))


def load_autoencoder(
    directory: Path, *, d_model: int | None = None, layers: int | None = None
) -> TopKAutoencoder:
    """Read a TopK dictionary of SAELens 3 to 6, or one of `save_autoencoder`, in fp32 on the CPU.

    What changes nothing but the form is folded into the weights: ``apply_b_dec_to_input: false``
    into b_enc, ``rescale_acts_by_decoder_norm: true`` into W_enc, b_enc and W_dec.

    Args:
        directory: holds ``cfg.json`` and ``sae_weights.safetensors``; nothing else is opened.
        d_model, layers: hidden size and number of decoder layers of the model it is meant for.

    Raises:
        ProfileError: a file is missing or unreadable; another architecture than TopK; a
            normalisation or reshaping of activations; a hook point that is no whole residual
            stream; another hidden size, or a layer that the model lacks; mismatched shapes;
            NaN or infinity.
    """
    config = _read_config(directory)
    k, layer = _checked(config, directory)
    found = _read_weights(directory)
    W_enc, b_enc = found["W_enc"].T.contiguous(), found["b_enc"]  # (n, d), (n,)
    W_dec, b_dec = found["W_dec"].T.contiguous(), found["b_dec"]  # (d, n), (d,)
    if W_enc.shape != W_dec.T.shape or W_enc.shape != (config.get("d_sae"), config.get("d_in")):
        raise ProfileError(
            f"{directory}: W_enc {tuple(found['W_enc'].shape)} and W_dec "
            f"{tuple(found['W_dec'].shape)} are not (d_in, d_sae) and (d_sae, d_in) of {CONFIG}"
        )
    if d_model is not None and W_enc.shape[1] != d_model:
        raise ProfileError(
            f"{directory}: d_in is {W_enc.shape[1]}, but the model's hidden size is {d_model}; "
            "this dictionary is of another model"
        )
    if layers is not None and layer >= layers:
        raise ProfileError(f"{directory}: reads layer {layer}, but the model has {layers} layers")
    if config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.pow(2).sum(0).sqrt().clamp(min=1e-8)  # (n,), as SAELens does
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms
    if not config["apply_b_dec_to_input"]:
        b_enc = b_enc + W_enc @ b_dec
    try:
        return TopKAutoencoder(W_enc, b_enc, W_dec, b_dec, k=k, layer=layer)
    except ValueError as error:
        raise ProfileError(f"{directory}: {error}") from None


def _read_config(directory: Path) -> dict[str, Any]:
    """cfg.json with the field names of SAELens 6."""
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read ({error}); {_ANOTHER}") from None
    if not isinstance(config, dict):
        raise ProfileError(f"{path}: is not an object; {_ANOTHER}")
    metadata = config.get("metadata")
    flat = {**config, **metadata} if isinstance(metadata, dict) else dict(config)
    # Before version 6 TopK was an activation function of the standard architecture.
    activation = flat.get("activation_fn", flat.get("activation_fn_str"))
    arguments = flat.get("activation_fn_kwargs")
    of_old = flat.get("architecture", "standard") in ("standard", "topk")
    if of_old and activation == "topk" and isinstance(arguments, dict) and "k" in arguments:
        flat.update(architecture="topk", k=arguments["k"])
    flat.setdefault("hook_name", flat.get("hook_point"))
    flat.setdefault("hook_head_index", flat.get("hook_point_head_index"))
    flat.setdefault("apply_b_dec_to_input", True)
    return flat


def _checked(config: Mapping[str, Any], directory: Path) -> tuple[int, int]:
    """k and the layer, or why this dictionary cannot be used."""

    def refuse(field: str, why: str) -> ProfileError:
        return ProfileError(
            f"{directory / CONFIG}: {field} is {json.dumps(config.get(field))}; {why}; {_ANOTHER}"
        )

    if config.get("architecture") != "topk":
        raise refuse("architecture", 'only "topk" autoencoders are read')
    if config.get("normalize_activations") not in (None, False, "none"):
        raise refuse("normalize_activations", "inputs that have to be normalised are not supported")
    if config.get("reshape_activations") not in (None, "none"):
        raise refuse("reshape_activations", "only whole residual streams are read")
    for field in ("finetuning_scaling_factor", "hook_head_index"):
        if config.get(field) is not None and config[field] is not False:  # 0 is a head
            raise refuse(field, "only whole, unscaled residual streams are read")
    processing = config.get("model_from_pretrained_kwargs")
    if isinstance(processing, dict) and any(processing.get(f) for f in _WEIGHT_PROCESSING):
        raise refuse("model_from_pretrained_kwargs", "it was trained on rewritten model weights")
    if not isinstance(config["apply_b_dec_to_input"], bool):
        raise refuse("apply_b_dec_to_input", "it must be true or false")
    if not isinstance(config.get("k"), int) or isinstance(config.get("k"), bool):
        raise refuse("k", "it must be a whole number")
    layer = _layer_of(str(config.get("hook_name")))
    if layer is None:
        raise refuse("hook_name", "it must be a residual stream after a decoder layer")
    return config["k"], layer


def _layer_of(hook_name: str) -> int | None:
    """The 0-based layer whose output a hook point is; the input of layer l is the output of l-1."""
    if match := _RESIDUAL.fullmatch(hook_name):
        layer = int(match[1]) - (match[2] == "pre")
        return layer if layer >= 0 else None
    match = _MODULE.fullmatch(hook_name)
    return int(match[1]) if match else None


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """The four tensors as they are on disk, fp32."""
    path = directory / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in directory.glob("*.p*t*") if p.suffix in (".pt", ".pth"))
        also = f" ({pickles[0]} is a pickle, and pickles are never loaded)" if pickles else ""
        raise ProfileError(f"{directory}: has no {WEIGHTS}{also}; {_ANOTHER}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ProfileError(f"{path}: is not a whole safetensors file ({error})") from None
    found = {}
    for name, dims in (("W_enc", 2), ("b_enc", 1), ("W_dec", 2), ("b_dec", 1)):
        if name not in tensors or tensors[name].dim() != dims:
            raise ProfileError(f"{path}: lacks a {dims}-dimensional {name}; {_ANOTHER}")
        found[name] = tensors[name].float()
        if not torch.isfinite(found[name]).all():
            raise ProfileError(f"{path}: {name} holds a NaN or an infinity; {_ANOTHER}")
    return found

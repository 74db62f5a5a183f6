"""The autoencoder against plain fp64 loops, and its files against SAELens' rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeft.errors import ProfileError
from safeft.sae import TopKAutoencoder, load_autoencoder, save_autoencoder

D, N = 6, 16


def autoencoder(seed: int = 0, k: int = 4, dtype: torch.dtype = torch.float64) -> TopKAutoencoder:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return TopKAutoencoder(normal(N, D), normal(N), normal(D, N), normal(D), k=k, layer=3)


def oracle(sae: TopKAutoencoder, h: Tensor) -> Tensor:
    """z of one token (d,), number by number."""
    pre = [
        sum(float(sae.W_enc[j, i]) * float(h[i] - sae.b_dec[i]) for i in range(D))
        + float(sae.b_enc[j])
        for j in range(N)
    ]
    best = sorted(range(N), key=lambda j: -pre[j])[: sae.k]
    return torch.tensor([max(0.0, pre[j]) if j in best else 0.0 for j in range(N)]).double()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), k=st.integers(1, N))
def test_encoding_and_decoding_are_the_published_formulas(seed: int, k: int) -> None:
    sae = autoencoder(seed, k)
    h = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(seed + 1)).double()
    z = sae.encode(h)
    for a in range(2):
        for b in range(3):
            torch.testing.assert_close(z[a, b], oracle(sae, h[a, b]))
            expected = [
                sum(float(sae.W_dec[i, j] * z[a, b, j]) for j in range(N)) + float(sae.b_dec[i])
                for i in range(D)
            ]
            torch.testing.assert_close(sae.decode(z[a, b]), torch.tensor(expected).double())


def test_a_negative_value_among_the_k_largest_becomes_zero() -> None:
    base = autoencoder(k=N)
    assert (base.pre_activations(torch.ones(D).double()) < 0).any()
    z = base.encode(torch.ones(D).double())
    assert (z >= 0).all() and 0 < int((z > 0).sum()) < N


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), chosen=st.sets(st.integers(0, N - 1), min_size=1))
def test_some_latents_are_those_of_the_whole_encoding_with_the_same_gradient(
    seed: int, chosen: set[int]
) -> None:
    sae, latents = autoencoder(seed), torch.tensor(sorted(chosen))
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(seed)).double()
    whole, few = h.clone().requires_grad_(), h.clone().requires_grad_()
    z, z_few = sae.encode(whole)[..., latents], sae.encode_latents(few, latents)
    torch.testing.assert_close(z_few, z)
    weight = torch.arange(1.0, len(latents) + 1).double()
    (z.pow(2) * weight).sum().backward()
    (z_few.pow(2) * weight).sum().backward()
    torch.testing.assert_close(few.grad, whole.grad)


def test_activations_of_another_dtype_are_read_in_the_autoencoders() -> None:
    sae = autoencoder().to("cpu", torch.float32)
    h = torch.randn(3, D).bfloat16()
    assert sae.encode(h).dtype == torch.float32
    torch.testing.assert_close(sae.encode(h), sae.encode(h.float()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 0}, "k must"),
        ({"k": N + 1}, "k must"),
        ({"layer": -1}, "layer"),
        ({"b_enc": torch.zeros(3)}, "b_enc"),
        ({"W_dec": torch.zeros(N, D)}, "W_dec"),
        ({"b_dec": torch.zeros(N)}, "b_dec"),
        ({"W_enc": torch.zeros(N)}, "W_enc"),
    ],
)
def test_what_makes_no_autoencoder_is_named(change: dict[str, Any], named: str) -> None:
    fields = {**vars(autoencoder()), **change}
    with pytest.raises(ValueError, match=named):
        TopKAutoencoder(**fields)


# On disk ----------------------------------------------------------------------------------------


def write(directory: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A TopK dictionary as SAELens 6 writes it; None removes a field or a tensor."""
    directory.mkdir(exist_ok=True)
    sae = autoencoder(dtype=torch.float32)
    weights = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec.T, "b_dec": sae.b_dec}
    weights = {k: v.contiguous() for k, v in {**weights, **tensors}.items() if v is not None}
    save_file(weights, directory / "sae_weights.safetensors")
    metadata = {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "hook_name": "blocks.3.hook_resid_post",
        "hook_head_index": None,
        "model_name": "tiny",
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }
    whole = {
        "architecture": "topk",
        "d_in": D,
        "d_sae": N,
        "k": 4,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    changes = dict(config or {})
    metadata |= changes.pop("metadata", {})
    fields = {k: v for k, v in {**whole, **changes}.items() if v is not None}
    (directory / "cfg.json").write_text(json.dumps({**fields, "metadata": metadata}))
    return directory


def saelens(directory: Path, h: Tensor) -> tuple[Tensor, Tensor]:
    """z and ĥ as SAELens 6 computes them from the files, written from its documentation."""
    config = json.loads((directory / "cfg.json").read_text())
    w = {k: v.double() for k, v in load_file(directory / "sae_weights.safetensors").items()}
    norms = w["W_dec"].norm(dim=-1) if config["rescale_acts_by_decoder_norm"] else torch.ones(N)
    x = h.double() - w["b_dec"] * config["apply_b_dec_to_input"]
    pre = (x @ w["W_enc"] + w["b_enc"]) * norms
    z = torch.zeros_like(pre)
    for row in range(len(pre)):
        for j in pre[row].argsort(descending=True)[: config["k"]]:
            z[row, j] = pre[row, j].clamp(min=0)
    return z, (z / norms) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_an_imported_dictionary_does_what_it_does_in_saelens(
    tmp_path: Path, apply_b_dec: bool, rescale: bool
) -> None:
    options = {"apply_b_dec_to_input": apply_b_dec, "rescale_acts_by_decoder_norm": rescale}
    directory = write(tmp_path / "sae", options)
    sae = load_autoencoder(directory, d_model=D, layers=4)
    h = torch.randn(20, D)
    z, h_hat = saelens(directory, h)
    assert (sae.layer, sae.k) == (3, 4)
    torch.testing.assert_close(sae.encode(h).double(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(h)).double(), h_hat, atol=1e-5, rtol=1e-5)


def test_what_is_saved_reads_back_bit_for_bit_here_and_the_same_in_saelens(tmp_path: Path) -> None:
    sae = autoencoder(dtype=torch.float32)
    save_autoencoder(sae, tmp_path, {"model_name": "tiny"})
    back = load_autoencoder(tmp_path)
    assert (back.k, back.layer) == (sae.k, sae.layer)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(back, name), getattr(sae, name))
    h = torch.randn(20, D)
    z, h_hat = saelens(tmp_path, h)
    torch.testing.assert_close(sae.encode(h).double(), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(h)).double(), h_hat, atol=1e-5, rtol=1e-5)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["model_name"] == "tiny"


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.3.hook_resid_post", 3),
        ("blocks.3.hook_resid_pre", 2),  # the input of one layer is the output of the one before
        ("model.layers.1", 1),
        ("transformer.h.2", 2),
    ],
)
def test_hook_points_of_the_residual_stream_name_the_layer_that_ends_there(
    tmp_path: Path, hook: str, layer: int
) -> None:
    directory = write(tmp_path / "sae", {"metadata": {"hook_name": hook}})
    assert load_autoencoder(directory, layers=4).layer == layer


def test_a_file_of_saelens_before_version_6_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path / "sae")
    (directory / "cfg.json").write_text(
        json.dumps(
            {
                "architecture": "standard",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 5},
                "d_in": D,
                "d_sae": N,
                "hook_name": "blocks.1.hook_resid_post",
                "hook_layer": 1,
                "hook_head_index": None,
                "normalize_activations": "none",
                "finetuning_scaling_factor": False,
                "sae_lens_training_version": "4.4.5",
            }
        )
    )
    sae = load_autoencoder(directory)
    assert (sae.k, sae.layer) == (5, 1)


NAN = torch.full((N,), float("nan"))
REFUSED: list[tuple[dict[str, Any], dict[str, Tensor | None], str]] = [
    ({"architecture": "standard"}, {}, 'architecture is "standard"'),
    ({"architecture": "jumprelu"}, {}, 'architecture is "jumprelu"'),
    ({"architecture": "transcoder"}, {}, 'architecture is "transcoder"'),
    ({"architecture": None}, {}, "architecture is null"),
    ({"normalize_activations": "layer_norm"}, {}, 'normalize_activations is "layer_norm"'),
    ({"normalize_activations": "expected_average_only_in"}, {}, "normalize_activations"),
    ({"reshape_activations": "hook_z"}, {}, "reshape_activations"),
    ({"finetuning_scaling_factor": True}, {}, "finetuning_scaling_factor"),
    ({"metadata": {"hook_head_index": 0}}, {}, "hook_head_index is 0"),
    ({"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, {}, "hook_name .*hook_mlp_out"),
    ({"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, {}, "hook_name"),
    ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, {}, "hook_name"),
    ({"metadata": {"hook_name": "blocks.4.hook_resid_post"}}, {}, "reads layer 4, .* 4 layers"),
    (
        {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
        {},
        "model_from_pretrained_kwargs",
    ),
    ({"apply_b_dec_to_input": "yes"}, {}, "apply_b_dec_to_input"),
    ({"k": None}, {}, "k is null"),
    ({"k": 4.5}, {}, "k is 4.5"),
    ({"k": N + 1}, {}, "k must be 1 to the width"),
    ({"d_in": D + 1}, {}, "not .d_in, d_sae. and .d_sae, d_in."),
    ({"d_sae": N + 1}, {}, "not .d_in, d_sae. and .d_sae, d_in."),
    ({}, {"b_enc": NAN}, "b_enc holds a NaN"),
    ({}, {"b_enc": None}, "lacks a 1-dimensional b_enc"),
    ({}, {"W_enc": torch.zeros(D)}, "lacks a 2-dimensional W_enc"),
    ({}, {"b_enc": torch.zeros(3)}, "b_enc must be"),
    ({}, {"W_dec": torch.zeros(D, N)}, "W_dec .*are not"),
]


@pytest.mark.parametrize(("config", "tensors", "named"), REFUSED)
def test_a_dictionary_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor | None], named: str
) -> None:
    directory = write(tmp_path / "sae", config, **tensors)
    with pytest.raises(ProfileError, match=named):
        load_autoencoder(directory, d_model=D, layers=4)


def test_a_dictionary_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="d_in is 6, but the model's hidden size is 576"):
        load_autoencoder(write(tmp_path / "sae"), d_model=576)


def test_pickles_are_named_and_never_opened(tmp_path: Path) -> None:
    directory = write(tmp_path / "sae")
    (directory / "sae_weights.safetensors").rename(directory / "ae.pt")
    with pytest.raises(ProfileError, match=r"ae\.pt is a pickle, and pickles are never loaded"):
        load_autoencoder(directory)


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_a_broken_or_missing_file_is_named_with_what_to_do(tmp_path: Path, file: str) -> None:
    directory = write(tmp_path / "sae")
    (directory / file).write_bytes(b"\x80\x04 no")
    with pytest.raises(ProfileError, match=file):
        load_autoencoder(directory)
    (directory / file).unlink()
    with pytest.raises(ProfileError, match=rf"{file}.*safeft profile build"):
        load_autoencoder(directory)

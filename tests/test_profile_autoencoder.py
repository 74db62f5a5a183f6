"""The profile's autoencoder part: trained or imported, with targets that a penalty can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.profile.autoencoder import build_autoencoder
from safeft.data import encode_prompt
from safeft.errors import ProfileError
from safeft.latents import load_activation_targets
from safeft.models import load_model, weights_hash
from safeft.own_refusals import OwnRefusal, load_refusals, save_refusals
from safeft.progress import silent
from safeft.prompts import KINDS, Kind, Prompt, load_prompts
from safeft.sae import TopKAutoencoder, save_autoencoder
from safeft.sae_training import AutoencoderConfig
from tests.tiny import tiny_tokenizer

CONFIG = AutoencoderConfig(
    expansion=2,
    k=12,
    steps=30,
    batch_size=64,
    buffer_tokens=600,
    min_variance_explained=0.0,
    latents=5,
)


def few_prompts(kind: Kind) -> list[Prompt]:
    """A dozen short ones."""
    return sorted(load_prompts(kind, "profile"), key=lambda prompt: len(prompt.text))[:12]


PROMPTS = {kind: few_prompts(kind) for kind in KINDS}


@pytest.fixture
def refusals(tmp_path: Path) -> Path:
    directory = tmp_path / "refusals"
    directory.mkdir()
    prompts = PROMPTS["harmful"][:8]
    save_refusals([OwnRefusal(p.text, "I can't help with that.") for p in prompts], directory)
    return directory


def build(model: Path, refusals: Path, out: Path, **given: Any) -> dict[str, Any]:
    out.mkdir()
    config = given.pop("config", CONFIG)
    build_autoencoder(model, refusals, out, config, silent, prompts=PROMPTS, **given)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_a_trained_part_holds_targets_a_report_and_a_picture(
    tiny_dir: Path, refusals: Path, tmp_path: Path
) -> None:
    report = build(tiny_dir, refusals, tmp_path / "part")
    targets = load_activation_targets(tmp_path / "part")
    assert targets.base_weights == weights_hash(tiny_dir)
    tokenizer = tiny_tokenizer()
    prompts = [refusal.prompt for refusal in load_refusals(refusals)]
    assert targets.prompts == [encode_prompt(prompt, tokenizer) for prompt in prompts]
    # One token closes the turn, "\n" follows, and the tiny tokenizer spells "assistant\n".
    template = 1 + len("\n") + 1 + len("assistant\n")
    assert targets.positions == report["positions"] == template
    assert targets.baseline.shape == (8, template, 5)
    assert [entry["latent"] for entry in report["latents"]] == targets.latents.tolist()
    assert report["layer"] == targets.autoencoder.layer == 1
    assert (report["width"], report["k"]) == (64, 12)
    assert 0 < report["held_out"]["variance_explained"] < 1
    assert report["training"]["curve"] and not report["training"]["imported"]
    assert (tmp_path / "part" / "autoencoder.svg").read_text().lstrip().startswith("<?xml")


def test_an_imported_dictionary_is_taken_over_measured_and_ranked(
    tiny_dir: Path, refusals: Path, tmp_path: Path
) -> None:
    d = load_model(tiny_dir).config.hidden_size
    W = torch.eye(d)
    both = torch.cat([W, -W])  # all of the residual stream, exactly
    given = TopKAutoencoder(both, torch.zeros(2 * d), both.T.contiguous(), torch.zeros(d), d, 0)
    (tmp_path / "sae").mkdir()
    save_autoencoder(given, tmp_path / "sae")
    report = build(tiny_dir, refusals, tmp_path / "part", import_from=tmp_path / "sae")
    targets = load_activation_targets(tmp_path / "part")
    assert torch.equal(targets.autoencoder.W_enc, both)
    assert report["training"] == {"imported": True}
    assert report["layer"] == 0
    assert report["held_out"]["variance_explained"] == pytest.approx(1.0, abs=1e-6)


def test_an_imported_dictionary_that_explains_too_little_is_refused(
    tiny_dir: Path, refusals: Path, tmp_path: Path
) -> None:
    d = load_model(tiny_dir).config.hidden_size
    W = torch.nn.functional.normalize(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))
    (tmp_path / "sae").mkdir()
    sae = TopKAutoencoder(W, torch.zeros(d), W.T.contiguous(), torch.zeros(d), 1, 0)
    save_autoencoder(sae, tmp_path / "sae")
    config = AutoencoderConfig(latents=5)
    with pytest.raises(ProfileError, match=r"explains .*import another one than .*sae, or train"):
        build(tiny_dir, refusals, tmp_path / "p", config=config, import_from=tmp_path / "sae")


def test_a_dictionary_of_a_deeper_model_is_refused(
    tiny_dir: Path, refusals: Path, tmp_path: Path
) -> None:
    d = load_model(tiny_dir).config.hidden_size
    W = torch.eye(d)
    (tmp_path / "sae").mkdir()
    save_autoencoder(TopKAutoencoder(W, torch.zeros(d), W, torch.zeros(d), 1, 2), tmp_path / "sae")
    with pytest.raises(ProfileError, match="reads layer 2, but the model has 2 layers"):
        build(tiny_dir, refusals, tmp_path / "part", import_from=tmp_path / "sae")


def test_chosen_positions_are_followed(tiny_dir: Path, refusals: Path, tmp_path: Path) -> None:
    config = AutoencoderConfig(**{**vars(CONFIG), "positions": 2, "layer": 0})
    report = build(tiny_dir, refusals, tmp_path / "part", config=config)
    assert load_activation_targets(tmp_path / "part").baseline.shape[1] == 2
    assert report["layer"] == 0

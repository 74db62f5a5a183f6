"""The profile's autoencoder: trained or imported, its safety-critical latents, their baselines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeft.data import encode_prompt
from safeft.latents import (
    Ranking,
    activation_targets,
    last_residuals,
    rank_latents,
    save_activation_targets,
)
from safeft.models import load_model, load_tokenizer, weights_hash
from safeft.own_refusals import load_refusals, refusal_row, template_start
from safeft.progress import Progress
from safeft.prompts import Kind, Prompt, spread
from safeft.sae import TopKAutoencoder, load_autoencoder
from safeft.sae_training import (
    AutoencoderConfig,
    CurvePoint,
    Reconstruction,
    measure,
    measure_on_texts,
    require_explained,
    train_autoencoder,
)
from safeft.stopped_forward import decoder_layers

REPORT, PLOT = "report.json", "autoencoder.svg"
_BENIGN: tuple[Kind, ...] = ("borderline", "benign")


def build_autoencoder(
    model_dir: Path,
    refusals: Path,
    out: Path,
    config: AutoencoderConfig,
    progress: Progress,
    *,
    prompts: Mapping[Kind, Sequence[Prompt]],
    import_from: Path | None = None,
) -> None:
    """Write the activation side of CWAC into a directory: see `safeft.latents` and `REPORT`.

    Texts are the profile's prompts: the harmful ones, where the model refused with its own refusal,
    and the benign and borderline ones. Latents are ranked on the refused prompts against as many
    benign and borderline ones, at their last positions.

    Args:
        refusals: holds refusals.jsonl, of the profile part (`safeft.own_refusals`).
        out: an existing, empty directory.
        import_from: a SAELens directory to take over instead of training.

    Raises:
        ProfileError: the autoencoder explains less than ``config.min_variance_explained`` of what
            it was not trained on; a dictionary that cannot be imported; too few refusals; a field
            that the model does not allow.
        TrainingError: the training diverged.
    """
    begun = time.monotonic()
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    refused = load_refusals(refusals)
    refused_prompts = [encode_prompt(refusal.prompt, tokenizer) for refusal in refused]
    asked = {refusal.prompt for refusal in refused}
    rows = [refusal_row(tokenizer, refusal).input_ids for refusal in refused]
    counts = {"harmful with the model's refusal": len(rows)}
    for kind in ("harmful", *_BENIGN):
        texts = [p.text for p in prompts[kind] if p.text not in asked]
        rows += [encode_prompt(text, tokenizer) for text in texts]
        counts[kind] = len(texts)
    positions = config.positions or _template_length(tokenizer, refused[0].prompt)

    curve: list[CurvePoint] = []
    training: dict[str, Any] = {"imported": import_from is not None}
    held_out: Sequence[int] = range(len(refused))
    if import_from is None:
        trained = train_autoencoder(model, rows, config, progress)
        autoencoder, reached = trained.autoencoder, trained.report.held_out
        held_out = [i for i in held_out if i in trained.held_out]
        curve = trained.report.curve
        training |= {k: v for k, v in asdict(trained.report).items() if k != "held_out"}
    else:
        autoencoder, reached = _imported(import_from, model, rows, config)

    harmful = last_residuals(model, autoencoder.layer, refused_prompts, positions, progress)
    benign = last_residuals(
        model, autoencoder.layer, _benign(tokenizer, prompts, len(refused)), positions, progress
    )
    ranking = rank_latents(autoencoder, harmful, benign, config.latents)
    targets = activation_targets(
        weights_hash(model_dir), autoencoder, ranking, refused_prompts, harmful
    )
    save_activation_targets(targets, out, model_name=getattr(model.config, "model_type", None))
    at_positions = [harmful[i] for i in held_out]
    report = {
        "layer": autoencoder.layer,
        "width": autoencoder.width,
        "k": autoencoder.k,
        "held_out": asdict(reached),
        "held_out_refused_prompts": asdict(measure(autoencoder, at_positions))
        if at_positions
        else None,
        "texts": counts,
        "training": training,
        "positions": positions,
        "latents": [
            {"latent": latent, "score": round(score, 4)}
            for latent, score in zip(ranking.latents.tolist(), ranking.scores.tolist(), strict=True)
        ],
        "baseline": {
            "prompts": len(refused),
            "mean_square": float(targets.baseline.pow(2).sum(2).mean()),
        },
        "config": asdict(config),
        "seconds": round(time.monotonic() - begun, 1),
    }
    (out / REPORT).write_text(json.dumps(report, indent=1))
    _plot(curve, reached, ranking, out / PLOT)


def _template_length(tokenizer: Any, prompt: str) -> int:
    """Tokens that the chat template puts after the instruction, at least 1."""
    ids = encode_prompt(prompt, tokenizer)
    return max(1, len(ids) - template_start(tokenizer, prompt))


def _benign(
    tokenizer: Any, prompts: Mapping[Kind, Sequence[Prompt]], count: int
) -> list[list[int]]:
    """Prompts to compare with: half of them borderline, which look like harmful ones."""
    texts: list[str] = []
    for i, kind in enumerate(_BENIGN):
        share = (count + i) // len(_BENIGN)
        texts += [p.text for p in spread(prompts[kind], share)]
    return [encode_prompt(text, tokenizer) for text in texts]


def _imported(
    directory: Path, model: Any, rows: list[list[int]], config: AutoencoderConfig
) -> tuple[TopKAutoencoder, Reconstruction]:
    layers = len(decoder_layers(model.get_decoder())[1])
    hidden = model.get_input_embeddings().weight.shape[1]
    autoencoder = load_autoencoder(directory, d_model=hidden, layers=layers)
    reached = measure_on_texts(model, autoencoder, rows)
    require_explained(reached, config, f"import another one than {directory}, or train one")
    return autoencoder, reached


def _plot(curve: list[CurvePoint], reached: Reconstruction, ranking: Ranking, path: Path) -> None:
    """The training curve, where there is one, and the scores of the latents taken."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if curve else 4.5, 3.2), layout="constrained")
    *before, right = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    for left in before:
        thousands = [point.trained / 1000 for point in curve]
        left.plot(thousands, [point.batch for point in curve], label="training batch")
        left.plot(thousands, [point.held_out for point in curve], label="held-out sample")
        left.axhline(reached.variance_explained, color="0.6", linestyle=":", label="held out, end")
        left.set(xlabel="thousand activations drawn", ylabel="variance explained")
        left.legend(frameon=False)
    right.plot(range(1, len(ranking.scores) + 1), ranking.scores.tolist(), ".")
    right.set(xlabel="rank", ylabel="score: harmful over benign", ylim=(0, None))
    figure.savefig(path, metadata={"Date": None})

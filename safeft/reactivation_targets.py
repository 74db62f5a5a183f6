"""The targets of a restoration: rows, and a reference's states at their last positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safeft.data import encode_prompt, pad_right
from safeft.errors import ProfileError
from safeft.evaluate import AnswerClass
from safeft.own_refusals import OwnRefusal, own_answers, template_start
from safeft.progress import Progress, silent
from safeft.safereact import ReferenceConfig, representation_layers
from safeft.stopped_forward import decoder_layers, residuals_after

FILE = "targets.safetensors"
REBUILD = "run `safeft profile build --model MODEL --part {part}`"
#: Where the models' own answers to borderline prompts are cut: the decision to answer falls early.
ANSWER_TOKENS = 12
_BATCH = 16


@dataclass(frozen=True)
class TargetRow:
    """A prompt as the trained model reads it, and as the reference does.

    Attributes:
        bare: tokens of the prompt, with the base model's answer where that is compared too.
        reminded: the same with the reminder in the prompt.
        count: positions that are compared: the last of both.
    """

    bare: list[int]
    reminded: list[int]
    count: int


@dataclass(frozen=True)
class Targets:
    """What a restoration trains towards.

    Attributes:
        weights: hash of the weights that are trained, or, in a profile, of the base model.
        layers: 0-based decoder layers.
        rows: tokens of each row, without a reminder.
        states: for each row ``(count, L, d)`` fp32: the reference's, at the row's last positions.
    """

    weights: str
    layers: tuple[int, ...]
    rows: list[list[int]]
    states: list[Tensor]


def harmful_rows(
    tokenizer: Any, refusals: Sequence[OwnRefusal], config: ReferenceConfig
) -> list[TargetRow]:
    """The harmful rows to compare at, from the base model's own refusals.

    Raises:
        ProfileError: see `safeft.own_refusals.template_start`.
    """
    return [
        _row(tokenizer, refusal.prompt, refusal.answer, config, config.reminder)
        for refusal in refusals[: config.prompts]
    ]


def borderline_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], progress: Progress = silent
) -> list[tuple[str, str]]:
    """Borderline-benign prompts that a model answers by the pattern judge, with its own answers.

    Raises:
        MeasurementError: see `safeft.evaluate.generate_greedy`.
    """
    return own_answers(
        model,
        tokenizer,
        prompts,
        AnswerClass.complied,
        answer_tokens=ANSWER_TOKENS,
        label="own answers to borderline prompts",
        progress=progress,
    )


def answered_rows(
    model: Any, tokenizer: Any, prompts: Sequence[str], config: ReferenceConfig, progress: Progress
) -> list[TargetRow]:
    """The rows of `borderline_answers`, without a reminder.

    Raises:
        MeasurementError: see `safeft.evaluate.generate_greedy`.
    """
    return [
        _row(tokenizer, prompt, answer, config, "")
        for prompt, answer in borderline_answers(model, tokenizer, prompts, progress)
    ]


def _row(
    tokenizer: Any, prompt: str, answer: str, config: ReferenceConfig, reminder: str
) -> TargetRow:
    parts = [text for text in (prompt, reminder) if text]
    reminded = " ".join(parts if config.place == "end" else parts[::-1])
    bare, with_reminder = (encode_prompt(text, tokenizer) for text in (prompt, reminded))
    count = len(bare) - 1  # an attention sink's state is no other token's to take over
    if config.at != "prompt":
        said: list[int] = tokenizer.encode(answer, add_special_tokens=False)
        if config.at == "response":
            count = len(bare) - template_start(tokenizer, prompt)
        bare, with_reminder, count = bare + said, with_reminder + said, count + len(said)
    return TargetRow(bare, with_reminder, count)


@torch.no_grad()
def reference_targets(
    reference: Any,
    rows: Sequence[TargetRow],
    config: ReferenceConfig,
    *,
    weights: str,
    progress: Progress = silent,
) -> Targets:
    """Read the reminded rows with the reference model.

    Raises:
        ProfileError: a state is not finite.
        ModelError: the model lacks one of the layers.
    """
    layers = config.layers or representation_layers(len(decoder_layers(reference.get_decoder())[1]))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].reminded))
    states: dict[int, Tensor] = {}
    for start in range(0, len(order), _BATCH):
        progress("reading the reference's states", start, len(order))
        chosen = order[start : start + _BATCH]
        # Padded on the right, where causal attention does not look; positions that count are found
        # from each row's own end, as left padding would align them.
        ids = pad_right([rows[i].reminded for i in chosen], 0)
        found = torch.stack(residuals_after(reference, layers, ids.to(reference.device)), dim=2)
        for place, i in enumerate(chosen):
            end = len(rows[i].reminded)
            states[i] = found[place, end - rows[i].count : end].float().cpu()  # (count, L, d)
            if not torch.isfinite(states[i]).all():
                raise ProfileError("the reference's states are not finite; check its weights")
    progress("reading the reference's states", len(order), len(order))
    return Targets(
        weights, tuple(layers), [row.bare for row in rows], [states[i] for i in range(len(rows))]
    )


def save_targets(targets: Targets, directory: Path) -> None:
    """Write one safetensors file."""
    tensors = {
        "rows": torch.tensor([token for row in targets.rows for token in row]),
        "row_lengths": torch.tensor([len(row) for row in targets.rows]),
        "states": torch.cat(targets.states),
        "state_counts": torch.tensor([len(states) for states in targets.states]),
    }
    metadata = {"weights": targets.weights, "layers": json.dumps(targets.layers)}
    save_file(tensors, directory / FILE, metadata=metadata)


def load_targets(directory: Path, part: str = "reminder-states") -> Targets:
    """What `save_targets` wrote; `part` of the profile, for the message.

    Raises:
        ProfileError: it is missing, unreadable or not what it should be.
    """
    path = directory / FILE
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        rows = tensors["rows"].split(tensors["row_lengths"].tolist())
        states = tensors["states"].split(tensors["state_counts"].tolist())
        layers = tuple(int(layer) for layer in json.loads(metadata["layers"]))
        if len(rows) != len(states) or tensors["states"].shape[1] != len(layers):
            raise ValueError("rows, states and layers do not fit together")
        return Targets(metadata["weights"], layers, [r.tolist() for r in rows], list(states))
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError, ValueError) as error:
        way_out = REBUILD.format(part=part)
        raise ProfileError(f"{path} cannot be read ({error}); {way_out}") from None

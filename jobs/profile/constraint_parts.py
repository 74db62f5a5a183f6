"""The parts that constraints on inputs and states need: the model's own refusals, what its layers
read at them, the autoencoder, its states there."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.profile.benign_inputs import build_benign_inputs
from jobs.profile.harmful_inputs import build_harmful_inputs
from jobs.profile.part import Context, Part, tokenizer_hash
from safeft.errors import MeasurementError
from safeft.evaluate import JUDGE_VERSION, AnswerClass
from safeft.models import load_model
from safeft.own_refusals import (
    OwnAnswer,
    load_answers,
    load_refusals,
    own_answers,
    own_refusals,
    save_answers,
    save_refusals,
)
from safeft.profile import hash_files
from safeft.prompts import Kind, spread
from safeft.reactivation_targets import (
    answered_rows,
    harmful_rows,
    reference_targets,
    save_targets,
)

HARMLESS: tuple[Kind, ...] = ("benign", "borderline")


class ConstraintParts:
    """Makes them for one build."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.profile, self.config = context.profile, context.config

    def parts(self) -> list[Part]:
        """Each after what it is made from."""
        return [
            Part("refusals", self._asked, self._refusals),
            Part("harmful-inputs", self._read_by, self._harmful_inputs, ("refusals",)),
            Part("answers", self._answered_by, self._answers),
            Part(
                "benign-inputs",
                self._contrasted_by,
                self._benign_inputs,
                ("harmful-inputs", "answers"),
            ),
            Part("autoencoder", self._trained_by, self._autoencoder, ("refusals",)),
            Part("held-states", self._held_by, self._held_states, ("refusals",)),
        ]

    def _asked(self) -> dict[str, Any]:
        return {
            "prompt_set": self.context.asked()["harmful"],
            "tokenizer": tokenizer_hash(self.context.tokenizer),
            "judge": JUDGE_VERSION,
            **asdict(self.config.refusals),
        }

    def _refusals(self, out: Path) -> None:
        prompts = spread(self.context.prompts["harmful"], self.config.refusals.prompts)
        refusals = own_refusals(
            load_model(self.context.model_dir),
            self.context.tokenizer,
            [prompt.text for prompt in prompts],
            answer_tokens=self.config.refusals.answer_tokens,
            progress=self.context.progress,
        )
        save_refusals(refusals, out)

    def _read_by(self) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer_hash(self.context.tokenizer),
            **asdict(self.config.harmful_inputs),
        }

    def _harmful_inputs(self, out: Path) -> None:
        build_harmful_inputs(
            self.context.model_dir,
            load_refusals(self.profile.path("refusals")),
            out,
            base_weights=self.profile.base_weights,
            energy=self.config.harmful_inputs.energy,
            workers=self.context.workers,
            progress=self.context.progress,
        )

    def _answered_by(self) -> dict[str, Any]:
        sets = self.context.asked()
        return {
            "prompt_sets": {kind: sets[kind] for kind in HARMLESS},
            "tokenizer": tokenizer_hash(self.context.tokenizer),
            "judge": JUDGE_VERSION,
            **asdict(self.config.answers),
        }

    def _answers(self, out: Path) -> None:
        config = self.config.answers
        asked = [p for k in HARMLESS for p in spread(self.context.prompts[k], config.prompts)]
        random.Random(0).shuffle(asked)
        found = own_answers(
            load_model(self.context.model_dir),
            self.context.tokenizer,
            [prompt.text for prompt in asked],
            AnswerClass.complied,
            answer_tokens=config.answer_tokens,
            label="own answers",
            progress=self.context.progress,
        )
        if not found:
            raise MeasurementError(
                f"the base model answers none of {len(asked)} harmless prompts; check its weights"
            )
        save_answers([OwnAnswer(prompt, answer) for prompt, answer in found], out)

    def _contrasted_by(self) -> dict[str, Any]:
        return {"tokenizer": tokenizer_hash(self.context.tokenizer)}

    def _benign_inputs(self, out: Path) -> None:
        build_benign_inputs(
            self.context.model_dir,
            load_answers(self.profile.path("answers")),
            self.profile.path("harmful-inputs"),
            out,
            base_weights=self.profile.base_weights,
            workers=self.context.workers,
            progress=self.context.progress,
        )

    def _trained_by(self) -> dict[str, Any]:
        imported = self.context.import_sae
        return {
            "prompt_sets": self.context.asked(),
            "tokenizer": tokenizer_hash(self.context.tokenizer),
            "imported": hash_files(imported) if imported else None,
            **asdict(self.config.autoencoder),
        }

    def _autoencoder(self, out: Path) -> None:
        from jobs.profile.autoencoder import build_autoencoder

        build_autoencoder(
            self.context.model_dir,
            self.profile.path("refusals"),
            out,
            self.config.autoencoder,
            self.context.progress,
            prompts=self.context.prompts,
            import_from=self.context.import_sae,
        )

    def _held_by(self) -> dict[str, Any]:
        return {
            "prompt_set": self.context.asked()["borderline"],
            "tokenizer": tokenizer_hash(self.context.tokenizer),
            "judge": JUDGE_VERSION,
            **asdict(self.config.held_states),
        }

    def _held_states(self, out: Path) -> None:
        model, tokenizer = load_model(self.context.model_dir), self.context.tokenizer
        config, progress = self.config.held_states.reference(), self.context.progress
        refusals = load_refusals(self.profile.path("refusals"))
        asked = spread(self.context.prompts["borderline"], config.borderline_prompts)
        prompts = [prompt.text for prompt in asked]
        rows = harmful_rows(tokenizer, refusals, config)
        rows += answered_rows(model, tokenizer, prompts, config, progress)
        base = self.profile.base_weights
        save_targets(reference_targets(model, rows, config, weights=base, progress=progress), out)

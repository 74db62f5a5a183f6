"""The parts that only `safeft restore` needs: SafeReAct's reference and its states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.profile.part import Context, Part, tokenizer_hash
from safeft.data import encode_prompt
from safeft.evaluate import JUDGE_VERSION
from safeft.models import load_model
from safeft.own_refusals import load_refusals
from safeft.prompts import spread
from safeft.reactivation_targets import (
    TargetRow,
    Targets,
    answered_rows,
    harmful_rows,
    reference_targets,
    save_targets,
)
from safeft.reference import pruning_mask
from safeft.wanda import load_mask, prune, pruned_share, save_mask

#: What a restoration reads to build a reference of its own in the same way.
CONFIG = "config.json"


class RestoreParts:
    """Makes them for one build."""

    def __init__(self, context: Context) -> None:
        self.context, self.profile = context, context.profile
        self.config, self.tokenizer = context.config.reference, context.tokenizer

    def parts(self) -> list[Part]:
        """Each after what it is made from."""
        return [
            Part("reference-mask", self._pruned_by, self._reference_mask, ("refusals",)),
            Part(
                "reminder-states",
                self._read_by,
                self._reminder_states,
                ("refusals", "reference-mask"),
            ),
        ]

    def _pruned_by(self) -> dict[str, Any]:
        fields = ("prompts", "domain_prompts", "domain_share", "safety_share")
        return {
            "prompt_set": self.context.asked()["benign"],
            "tokenizer": tokenizer_hash(self.tokenizer),
            **{name: getattr(self.config, name) for name in fields},
        }

    def _reference_mask(self, out: Path) -> None:
        prompts = spread(self.context.prompts["benign"], self.config.domain_prompts)
        mask = pruning_mask(
            load_model(self.context.model_dir),
            self.tokenizer,
            [encode_prompt(prompt.text, self.tokenizer) for prompt in prompts],
            load_refusals(self.profile.path("refusals")),
            self.config,
            self.context.progress,
        )
        save_mask(mask, out)
        (out / "report.json").write_text(json.dumps({"pruned_share": pruned_share(mask)}))

    def _read_by(self) -> dict[str, Any]:
        return {
            "prompt_set": self.context.asked()["borderline"],
            "tokenizer": tokenizer_hash(self.tokenizer),
            "judge": JUDGE_VERSION,
            **asdict(self.config),
        }

    def _reminder_states(self, out: Path) -> None:
        reference = load_model(self.context.model_dir)
        borderline = spread(self.context.prompts["borderline"], self.config.borderline_prompts)
        answered = answered_rows(
            reference,
            self.tokenizer,
            [prompt.text for prompt in borderline],
            self.config,
            self.context.progress,
        )
        as_it_is = self._targets(reference, answered)
        prune(reference, load_mask(self.profile.path("reference-mask")))
        refusals = load_refusals(self.profile.path("refusals"))
        pruned = self._targets(reference, harmful_rows(self.tokenizer, refusals, self.config))
        targets = replace(
            pruned, rows=pruned.rows + as_it_is.rows, states=pruned.states + as_it_is.states
        )
        save_targets(targets, out)
        (out / CONFIG).write_text(json.dumps(asdict(self.config)))

    def _targets(self, reference: Any, rows: Sequence[TargetRow]) -> Targets:
        return reference_targets(
            reference,
            rows,
            self.config,
            weights=self.profile.base_weights,
            progress=self.context.progress,
        )

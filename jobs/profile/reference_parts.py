"""The parts between the directions and the threshold: do the directions steer, and at which state
are rows read?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.profile.part import Context, Part, prompt_sets, tokenizer_hash
from safeft.adapters import LoraFactors, factors_of, load_factors, save_factors
from safeft.directions import DANGER_START, DPO_BETA, SAFETY_SCALES, fit_sft
from safeft.errors import ProfileError
from safeft.fit import FitConfig, new_adapter
from safeft.models import load_model
from safeft.profile import checkpoint
from safeft.reference_rows import Half, opened_rows, wordings_hash
from safeft.reference_state import (
    RULE,
    Candidate,
    ReferenceState,
    choose,
    drift,
    eligible,
    length,
)
from safeft.selection import selection_rows, separation, steering_pairs
from safeft.selection import wordings_hash as selection_wordings_hash
from safeft.sqsd import Projection, RowScore, SqsdScorer
from safeft.steering import MAGNITUDES, Sense, require_steering, safety_scores, steered

#: The fields of ProfileConfig that the directions depend on, and so all that rests on them.
FIELDS = ("safety", "danger", "prompts", "skip_layers", "calibration")
CHECKPOINTS = 3
SENSES: dict[str, Sense] = {"safety-direction": "rises", "danger-direction": "falls"}


def direction_inputs(context: Context) -> dict[str, Any]:
    """What decides a direction, beside the base weights."""
    config = asdict(context.config)
    return {
        "prompt_sets": prompt_sets("profile"),
        "wordings": wordings_hash(),
        "tokenizer": tokenizer_hash(context.tokenizer),
        "danger_start": DANGER_START,
        "dpo_beta": DPO_BETA,
        **{name: config[name] for name in FIELDS},
    }


def fresh_adapter(context: Context, fit: FitConfig) -> Any:
    """The base model with a new adapter on the layers that directions cover."""
    model = load_model(context.model_dir)
    layers: int = model.config.num_hidden_layers
    return new_adapter(model, fit, first_layer=int(context.config.skip_layers * layers))


def save(direction: LoraFactors, out: Path, losses: list[float]) -> None:
    """Write a direction and its loss curve."""
    save_factors(direction, out)
    (out / "training.json").write_text(json.dumps({"losses": losses}))


class ReferenceParts:
    """Makes them for one build."""

    def __init__(self, context: Context) -> None:
        self.context, self.profile, self.config = context, context.profile, context.config
        self.progress, self.tokenizer = context.progress, context.tokenizer

    def parts(self) -> list[Part]:
        """Each after what it is made from; the directions stand before them."""
        directions = ("danger-direction", "safety-direction")
        states = (*directions, "benign-trajectory")
        return [
            Part("steering", self._steered_by, self._steering, directions),
            Part("benign-trajectory", self._tuned_by, self._benign_trajectory),
            Part("reference-state", self._chosen_by, self._reference_state, states),
        ]

    def _steered_by(self) -> dict[str, Any]:
        return {
            "selection_wordings": selection_wordings_hash(),
            "magnitudes": MAGNITUDES,
            "steering": self.config.steering,
            **direction_inputs(self.context),
        }

    def _steering(self, out: Path) -> None:
        model = load_model(self.context.model_dir)
        harmful, benign = steering_pairs(self.tokenizer, self.config.prompts, self.config.steering)
        label, steps = "profile: checking that the directions steer", len(SENSES) * len(MAGNITUDES)
        pad_token_id = self.tokenizer.pad_token_id
        pairs = [*harmful, *benign]
        base = safety_scores(model, pairs, pad_token_id)
        found: dict[str, Any] = {}
        for name, sense in SENSES.items():
            direction = load_factors(self.profile.path(name))
            scores = dict.fromkeys(MAGNITUDES, base)
            for i, magnitude in enumerate(MAGNITUDES):
                self.progress(label, len(found) * len(MAGNITUDES) + i, steps)
                if magnitude:
                    with steered(model, direction, magnitude):
                        scores[magnitude] = safety_scores(model, pairs, pad_token_id)
            on_harmful = {by: values[: len(harmful)] for by, values in scores.items()}
            found[name] = {
                "sense": sense,
                "shift": require_steering(name.replace("-", " "), sense, on_harmful),
                "magnitudes": MAGNITUDES,
                "harmful": list(on_harmful.values()),
                "benign": [values[len(harmful) :] for values in scores.values()],
            }
        self.progress(label, steps, steps)
        (out / "steering.json").write_text(json.dumps(found, indent=1))

    def _tuned_by(self) -> dict[str, Any]:
        config = asdict(self.config)
        return {
            "prompt_set": prompt_sets("profile"),
            "wordings": wordings_hash(),
            "tokenizer": tokenizer_hash(self.context.tokenizer),
            **{name: config[name] for name in ("benign", "prompts", "skip_layers")},
        }

    def _benign_trajectory(self, out: Path) -> None:
        fit = self.config.benign
        model = fresh_adapter(self.context, fit)
        kept = {max(1, fit.steps * i // CHECKPOINTS) for i in range(1, CHECKPOINTS + 1)}

        def keep(step: int) -> None:
            if step in kept:
                save_factors(factors_of(model), out / checkpoint(step))

        losses = fit_sft(
            model,
            opened_rows(self.tokenizer, Half(builds=True), self.config.prompts),
            self.tokenizer.pad_token_id,
            fit,
            "profile: benign trajectory",
            self.progress,
            after_step=keep,
        )
        trajectory = {"losses": losses, "checkpoints": sorted(kept)}
        (out / "training.json").write_text(json.dumps(trajectory))

    def _chosen_by(self) -> dict[str, Any]:
        return {
            "selection_wordings": selection_wordings_hash(),
            "selection": self.config.selection,
            "scales": SAFETY_SCALES,
            "rule": RULE,
            **direction_inputs(self.context),
        }

    def _reference_state(self, out: Path) -> None:
        directions = {name: load_factors(self.profile.path(name)) for name in SENSES}
        danger, safety = directions["danger-direction"], directions["safety-direction"]
        steps = self.profile.json("benign-trajectory", "training.json")["checkpoints"]
        states = {ReferenceState("safety", s): self.profile.safety_state(s) for s in SAFETY_SCALES}
        states |= {ReferenceState("benign", n): self.profile.benign_state(n) for n in steps}
        model = load_model(self.context.model_dir)
        classes = selection_rows(self.tokenizer, self.config.prompts, self.config.selection)
        rows = [r for kind in classes for group in kind.values() for r in group]
        halves: dict[ReferenceState, list[RowScore]] = {}
        label = "profile: measuring reference states"
        for state, factors in states.items():
            self.progress(label, len(halves), len(states))
            halves[state] = SqsdScorer(
                model,
                Projection(factors, danger),
                Projection(factors, safety),
                pad_token_id=self.tokenizer.pad_token_id,
            ).score(rows)
            if lost := [s for s in halves[state] if s.error]:
                raise ProfileError(f"reference state: a row has no score ({lost[0].error})")
        self.progress(label, len(states), len(states))

        def candidate(state: ReferenceState, safety_state: ReferenceState) -> Candidate:
            """Each half of the score read at a state of its own, or both at the same."""
            both = zip(halves[state], halves[safety_state], strict=True)
            scores = iter([one.danger - other.safety for one, other in both])
            benign, dangerous = (
                {name: [next(scores) for _ in group] for name, group in kind.items()}
                for kind in classes
            )
            update = states[state]
            return Candidate(
                state, drift(update, danger), length(update), *separation(benign, dangerous)
            )

        scaled = [candidate(s, s) for s in states if s.trajectory == "safety"]
        safety_state = choose(scaled).state
        tuned = [candidate(s, safety_state) for s in states if s.trajectory == "benign"]
        candidates = [*scaled, *tuned]
        chosen, let_in = choose(candidates), eligible(candidates)
        choice = {
            "chosen": asdict(chosen.state),
            "safety_scale": safety_state.at,
            "rule": RULE,
            "rows": {name: len(group) for kind in classes for name, group in kind.items()},
            "candidates": [
                {**asdict(c), "auc": c.auc, "eligible": c in let_in} for c in candidates
            ],
        }
        (out / "choice.json").write_text(json.dumps(choice, indent=1))

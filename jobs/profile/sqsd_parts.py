"""The parts that screening, AsFT and the gate need: directions, threshold and baseline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.evaluate import MAX_NEW_TOKENS, evaluate
from jobs.profile.part import Context, Part, prompt_sets, tokenizer_hash
from jobs.profile.reference_parts import ReferenceParts, direction_inputs, fresh_adapter, save
from safeft.adapters import factors_of
from safeft.calibration import calibrate
from safeft.constraints.alignment import SIGNED, alignment_direction, save_directions
from safeft.data import TokenisedRow
from safeft.directions import DANGER_START, difference, fit_dpo, fit_sft, start_at
from safeft.errors import ProfileError
from safeft.evaluate import JUDGE_VERSION
from safeft.models import load_model, weights_hash
from safeft.reference_rows import (
    BENIGN_KINDS,
    Half,
    benign_rows,
    danger_rows,
    obedient_rows,
    opened_rows,
    safety_pairs,
)
from safeft.screen_policy import ScreenPolicy
from safeft.sqsd import RowScore, SqsdScorer

BUILD, CALIBRATE = Half(builds=True), Half(builds=False)
#: Without an answer's substance only harmlessness is left to tell them from dangerous rows.
LOOK_ALIKES = "borderline, compliant opening"
#: What scores rest on: directions that steer, and the states that rows are read at.
CALIBRATED_FROM = ("danger-direction", "safety-direction", "steering", "reference-state")


class SqsdParts:
    """Makes them for one build."""

    def __init__(self, context: Context) -> None:
        self.context, self.profile, self.config = context, context.profile, context.config
        self.progress, self.tokenizer = context.progress, context.tokenizer
        self.model_dir, self.unaligned_dir = context.model_dir, context.unaligned_dir

    def parts(self) -> list[Part]:
        """Each after what it is made from."""
        return [
            Part("alignment", self._pair, self._alignment),
            Part("safety-direction", self._made_by, self._safety_direction),
            Part("danger-direction", self._made_by, self._danger_direction, ("safety-direction",)),
            *ReferenceParts(self.context).parts(),
            Part("calibration", self._calibrated_by, self._calibration, CALIBRATED_FROM),
            Part("baseline", self._asked, self._baseline),
        ]

    def _pair(self) -> dict[str, Any]:
        return {"unaligned": weights_hash(self._unaligned()), "right_vectors": SIGNED}

    def _made_by(self) -> dict[str, Any]:
        return direction_inputs(self.context)

    def _calibrated_by(self) -> dict[str, Any]:
        return {"policy": asdict(ScreenPolicy(0.0)), **self._made_by()}

    def _asked(self) -> dict[str, Any]:
        return {
            "prompt_sets": prompt_sets("report"),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "judge": JUDGE_VERSION,
            "max_new_tokens": MAX_NEW_TOKENS,
        }

    def _unaligned(self) -> Path:
        if self.unaligned_dir is None:
            raise ProfileError("the alignment direction needs the unaligned model: --unaligned")
        return self.unaligned_dir

    def _alignment(self, out: Path) -> None:
        directions = alignment_direction(
            self.model_dir, self._unaligned(), _is_linear, self.progress
        )
        save_directions(directions, out, aligned_hash=self.profile.base_weights)

    def _safety_direction(self, out: Path) -> None:
        model = fresh_adapter(self.context, self.config.safety)
        losses = fit_dpo(
            model,
            safety_pairs(self.tokenizer, BUILD, self.config.prompts),
            self.tokenizer.pad_token_id,
            self.config.safety,
            "profile: safety direction",
            self.progress,
        )
        save(factors_of(model), out, losses)

    def _danger_direction(self, out: Path) -> None:
        model = fresh_adapter(self.context, self.config.danger)
        start_at(model, self.profile.safety_state(DANGER_START))
        start = factors_of(model)
        losses = fit_sft(
            model,
            danger_rows(self.tokenizer, BUILD, self.config.prompts),
            self.tokenizer.pad_token_id,
            self.config.danger,
            "profile: danger direction",
            self.progress,
        )
        save(difference(factors_of(model), start), out, losses)

    def _calibration(self, out: Path) -> None:
        n, tokenizer = self.config.calibration, self.tokenizer
        model = load_model(self.model_dir)
        classes: dict[str, list[TokenisedRow]] = {}
        for kind in BENIGN_KINDS:
            classes[kind] = benign_rows(
                model,
                tokenizer,
                CALIBRATE,
                n,
                answer_tokens=32,
                kinds=(kind,),
                progress=self.progress,
            )
            classes[f"{kind}, compliant opening"] = opened_rows(tokenizer, CALIBRATE, n, (kind,))
        classes["danger"] = danger_rows(tokenizer, CALIBRATE, n)
        classes["obedient danger"] = obedient_rows(tokenizer, CALIBRATE, n)
        scorer = SqsdScorer(
            model,
            self.profile.danger(),
            self.profile.safety(),
            pad_token_id=tokenizer.pad_token_id,
        )
        scores: dict[str, list[RowScore]] = {}
        for done, (name, rows) in enumerate(classes.items()):
            self.progress("profile: calibrating the threshold", done, len(classes))
            scores[name] = scorer.score(rows)
            if lost := [s for s in scores[name] if s.error]:
                raise ProfileError(f"calibration: a {name} row has no score ({lost[0].error})")
        values = {name: [s.score for s in part] for name, part in scores.items()}
        benign = {name: v for name, v in values.items() if name == "benign"}
        danger = {name: v for name, v in values.items() if "danger" in name}
        look_alikes = {LOOK_ALIKES: values[LOOK_ALIKES]}
        others = {**benign, **danger, **look_alikes}
        hard = {name: v for name, v in values.items() if name not in others}
        policy, quality = calibrate(benign, danger, hard, look_alikes)
        (out / "policy.json").write_text(json.dumps(asdict(policy), indent=1))
        (out / "quality.json").write_text(json.dumps(quality, indent=1))
        summary = {
            name: [[s.score, s.danger, s.safety, s.tokens, s.trained] for s in part]
            for name, part in scores.items()
        }
        (out / "scores.json").write_text(json.dumps(summary))
        self.progress("profile: calibrating the threshold", len(classes), len(classes))

    def _baseline(self, out: Path) -> None:
        evaluate(self.model_dir, output=out / "evaluation.json", progress=self.progress)


def _is_linear(name: str) -> bool:
    return name.endswith("_proj")

"""Building a safety profile: part by part, each published whole, so that a build resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jobs.evaluate import MAX_NEW_TOKENS, evaluate
from safeft import __version__
from safeft.adapters import LoraFactors, factors_of, save_factors
from safeft.cache import discard_dir, locked, publish_dir
from safeft.calibration import calibrate
from safeft.constraints.alignment import alignment_direction, save_directions
from safeft.data import TokenisedRow
from safeft.directions import DPO_BETA, SAFETY_SCALE, difference, fit_dpo, fit_sft, start_at
from safeft.errors import ProfileError
from safeft.evaluate import JUDGE_VERSION
from safeft.fit import FitConfig, new_adapter
from safeft.models import load_model, load_tokenizer, weights_hash
from safeft.profile import PARTS, RECORD, SafetyProfile, ScreenPolicy
from safeft.progress import Progress, silent
from safeft.prompts import KINDS, Split, load_prompts, prompt_set_hash
from safeft.reference_rows import (
    Half,
    benign_rows,
    danger_rows,
    obedient_rows,
    opened_rows,
    safety_pairs,
    wordings_hash,
)
from safeft.sqsd import RowScore, SqsdScorer

BUILD, CALIBRATE = Half(builds=True), Half(builds=False)


@dataclass(frozen=True)
class ProfileConfig:
    """How the SQSD parts are built. The defaults are set for the demo model.

    Attributes:
        safety, danger: the two trainings. The paper's rate of 5e-6 is for 8B models.
        prompts: harmful prompts behind each direction; the safety pairs have as many benign ones.
        skip_layers: share of the decoder's layers, from the input on, that directions leave out.
            What tells a refusal from compliance sits in the later ones, and rows cost less.
        calibration: benign rows that the threshold is set on; the other classes have half as many.
    """

    safety: FitConfig = field(
        default_factory=lambda: FitConfig(learning_rate=1e-3, batch_size=8, steps=72)
    )
    danger: FitConfig = field(default_factory=lambda: FitConfig(learning_rate=5e-4, steps=16))
    prompts: int = 320
    skip_layers: float = 0.5
    calibration: int = 96

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def build_profile(
    model_dir: Path,
    unaligned_dir: Path,
    *,
    root: Path | None = None,
    config: ProfileConfig | None = None,
    progress: Progress = silent,
) -> SafetyProfile:
    """Build what is missing or outdated of a base model's profile.

    Args:
        model_dir, unaligned_dir: the aligned model that tenants tune, and the model it was made
            from, as resolved directories.

    Raises:
        ProfileError: a direction that does not separate danger from benign rows.
        ModelError: the two models do not pair.
    """
    config = config or ProfileConfig()
    profile = SafetyProfile.for_weights(weights_hash(model_dir), root)
    build = _Build(profile, model_dir, unaligned_dir, config, progress)
    with locked(profile.root):
        build.run()
    return profile


class _Build:
    def __init__(
        self,
        profile: SafetyProfile,
        model_dir: Path,
        unaligned_dir: Path,
        config: ProfileConfig,
        progress: Progress,
    ) -> None:
        self.profile, self.config, self.progress = profile, config, progress
        self.model_dir, self.unaligned_dir = model_dir, unaligned_dir
        self.tokenizer = load_tokenizer(model_dir)

    def run(self) -> None:
        self._discard_foreign_parts()
        made_by = {
            "prompt_sets": _prompt_sets("profile"),
            "wordings": wordings_hash(),
            "tokenizer": _tokenizer_hash(self.tokenizer),
            "safety_scale": SAFETY_SCALE,
            "dpo_beta": DPO_BETA,
            **asdict(self.config),
        }
        self._part("alignment", {"unaligned": weights_hash(self.unaligned_dir)}, self._alignment)
        self._part("safety-direction", made_by, self._safety_direction)
        self._part("danger-direction", made_by, self._danger_direction, "safety-direction")
        policy = {"policy": asdict(ScreenPolicy(0.0)), **made_by}
        self._part("calibration", policy, self._calibration, "danger-direction", "safety-direction")
        asked = {
            "prompt_sets": _prompt_sets("report"),
            "tokenizer": _tokenizer_hash(self.tokenizer),
            "judge": JUDGE_VERSION,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        self._part("baseline", asked, self._baseline)

    def _discard_foreign_parts(self) -> None:
        """Parts that an older version made and this one does not know."""
        for record in self.profile.root.glob(f"*/{RECORD}"):
            if record.parent.name not in PARTS:
                discard_dir(record.parent)

    def _part(
        self, name: str, made_by: dict[str, Any], make: Callable[[Path], None], *upstream: str
    ) -> None:
        """Make a part unless it is there, from these inputs and from these parts as they are."""
        inputs = {
            **made_by,
            "code_version": __version__,
            "upstream": {part: self.profile.part_digest(part) for part in upstream},
        }
        if self.profile.built(name, inputs):
            return
        target = self.profile.root / name
        if target.exists():
            if not (target / RECORD).is_file():
                raise ProfileError(f"{target} is no part of a profile; choose another directory")
            discard_dir(target)
        with publish_dir(target) as staging:
            make(staging)
            self.profile.write_record(staging, inputs)

    def _fresh(self, fit: FitConfig) -> Any:
        model = load_model(self.model_dir)
        layers: int = model.config.num_hidden_layers
        return new_adapter(model, fit, first_layer=int(self.config.skip_layers * layers))

    def _alignment(self, out: Path) -> None:
        directions = alignment_direction(
            self.model_dir, self.unaligned_dir, _is_linear, self.progress
        )
        save_directions(
            directions, out / "directions.safetensors", aligned_hash=self.profile.base_weights
        )

    def _safety_direction(self, out: Path) -> None:
        model = self._fresh(self.config.safety)
        losses = fit_dpo(
            model,
            safety_pairs(self.tokenizer, BUILD, self.config.prompts),
            self.tokenizer.pad_token_id,
            self.config.safety,
            "profile: safety direction",
            self.progress,
        )
        _save(factors_of(model), out, losses)

    def _danger_direction(self, out: Path) -> None:
        model = self._fresh(self.config.danger)
        start_at(model, self.profile.reference_state())
        start = factors_of(model)
        losses = fit_sft(
            model,
            danger_rows(self.tokenizer, BUILD, self.config.prompts),
            self.tokenizer.pad_token_id,
            self.config.danger,
            "profile: danger direction",
            self.progress,
        )
        _save(difference(factors_of(model), start), out, losses)

    def _calibration(self, out: Path) -> None:
        n, tokenizer = self.config.calibration, self.tokenizer
        model = load_model(self.model_dir)
        classes: dict[str, list[TokenisedRow]] = {
            "benign": benign_rows(
                model, tokenizer, CALIBRATE, n, answer_tokens=32, progress=self.progress
            ),
            "benign, compliant opening": opened_rows(tokenizer, CALIBRATE, n // 2),
            "danger": danger_rows(tokenizer, CALIBRATE, n // 2),
            "obedient danger": obedient_rows(tokenizer, CALIBRATE, n // 2),
        }
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
        benign = {name: v for name, v in values.items() if name.startswith("benign")}
        policy, quality = calibrate(
            benign, {name: v for name, v in values.items() if name not in benign}
        )
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


def _prompt_sets(split: Split) -> dict[str, str]:
    return {kind: prompt_set_hash([p.text for p in load_prompts(kind, split)]) for kind in KINDS}


def _tokenizer_hash(tokenizer: Any) -> str:
    """Over the template and the vocabulary: what a prompt becomes before the weights see it."""
    content = [tokenizer.chat_template, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_linear(name: str) -> bool:
    return name.endswith("_proj")


def _save(direction: LoraFactors, out: Path, losses: list[float]) -> None:
    save_factors(direction, out)
    (out / "training.json").write_text(json.dumps({"losses": losses}))

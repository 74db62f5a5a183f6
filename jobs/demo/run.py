"""The demo: two tenants' data through the whole main job, on one real model.

Three fine-tuning runs: the benign tenant's data plainly and under a constraint, and, to show what
screening prevented, the poisoned data plainly. Every stage is kept in the cache, so a demo that
was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.demo.datasets import DemoData, demo_data
from jobs.evaluate import evaluate
from jobs.evaluation import Evaluation
from jobs.finetune.manifest import Manifest, libraries
from jobs.finetune.telemetry import read_metrics
from jobs.intake import screen_file
from jobs.pipeline import TRAINING, JobResult, run_job
from jobs.profile import build_profile
from jobs.report import DemoReport
from jobs.report.model import (
    ArmReport,
    ChatExample,
    CurvePoint,
    ProfileSummary,
    ScoredRow,
    ServedModel,
    TenantReport,
)
from jobs.spec import (
    DataSpec,
    FinetuneSpec,
    LoraSpec,
    ScreeningSpec,
    TrainingSpec,
)
from jobs.verdict import FORMAT, Verdict, read_scores
from safeft import __version__
from safeft.cache import cache_root, discard_dir
from safeft.constraints import AsftConfig, ConstraintConfig
from safeft.data import load_rows
from safeft.evaluate import generate_greedy
from safeft.models import load_merged, load_tokenizer, resolve
from safeft.profile import SCREENING_PARTS, SafetyProfile
from safeft.progress import Progress, silent
from safeft.prompts import KINDS

MODEL, UNALIGNED = "demo:aligned", "demo:base"
ROWS, MAX_TOKENS = 120, 384
QUESTION = "How long do I have to send a bike back, and when do I get my money?"
WHY_TRAIN_REJECTED = "demo: shows what screening prevented; the adapter is not to be used"
# Chosen on the validation prompts (docs/methods/asft.md has the table).
CONSTRAINT = AsftConfig(lam=5.0, anchor="paper")


@dataclass(frozen=True)
class Arm:
    """One fine-tuning run of the demo."""

    key: str
    name: str
    tenant: str
    constraint: ConstraintConfig | None = None


ARMS = (
    Arm("benign-plain", "benign data, plain", "velora"),
    Arm("benign-asft", "benign data, AsFT", "velora", CONSTRAINT),
    Arm("poisoned-plain", "poisoned data, plain (what screening prevented)", "velora-poisoned"),
)


class Demo:
    """The stages, in order: prepare, screen, one call of train for each arm, finish."""

    def __init__(self, *, seed: int = 0, fresh: bool = False) -> None:
        self.seed, self.fresh, self.started = seed, fresh, time.monotonic()
        self.data: DemoData = demo_data(ROWS, seed)
        self.files = {"velora": self.data.benign, "velora-poisoned": self.data.poisoned}
        self.results: dict[str, JobResult] = {}
        self.verdicts: dict[str, tuple[Verdict, Path]] = {}

    def prepare(self, progress: Progress = silent) -> None:
        """Model, aligned model, safety profile and the baseline on the tenants' held-out rows."""
        unaligned = resolve(UNALIGNED, progress)
        self.model_dir = resolve(MODEL, progress)
        self.profile: SafetyProfile = build_profile(
            self.model_dir, unaligned, parts=SCREENING_PARTS, progress=progress
        )
        # A run belongs to these weights and this profile; others have directories of their own.
        # So do runs of another format: an update of safeft begins anew instead of stopping.
        bound = f"{self.profile.digest()} {Manifest.model_fields['format'].default} {FORMAT}"
        key = hashlib.sha256(bound.encode()).hexdigest()[:12]
        name = f"{self.data.benign.parent.name}-{key}-seed-{self.seed}"
        self.runs = cache_root() / "demo" / f"runs-{name}"
        if self.fresh and self.runs.exists():
            discard_dir(self.runs)
        self.baseline: Evaluation = evaluate(
            self.model_dir,
            held_out=load_rows(self.data.held_out),
            max_tokens=MAX_TOKENS,
            output=self.runs / "baseline.json",
            progress=progress,
        )

    def screen(self, tenant: str, progress: Progress = silent) -> Verdict:
        """Screen one tenant's file."""
        self.verdicts[tenant] = screen_file(
            self.files[tenant],
            model=MODEL,
            max_tokens=MAX_TOKENS,
            output=self.runs / f"screening-{tenant}",
            progress=progress,
        )
        return self.verdicts[tenant][0]

    def train(self, arm: Arm, progress: Progress = silent) -> JobResult:
        """Run one arm through the main job."""
        spec = FinetuneSpec(
            name=arm.key,
            model=MODEL,
            data=DataSpec(
                train=self.files[arm.tenant],
                validation=self.data.held_out,
                max_tokens=MAX_TOKENS,
            ),
            lora=LoraSpec(rank=8, alpha=16, target_modules="all-linear"),
            training=TrainingSpec(
                epochs=3, batch_size=8, learning_rate=1e-3, schedule="cosine", seed=self.seed
            ),
            constraints=(arm.constraint,) if arm.constraint else (),
            screening=ScreeningSpec(
                override_reason=WHY_TRAIN_REJECTED if arm.tenant == "velora-poisoned" else None
            ),
            output=self.runs / _directory(arm),
        )
        self.results[arm.key] = run_job(
            spec,
            lambda label, done, total: progress(f"{arm.name}: {label}", done, total),
            screening=self.verdicts[arm.tenant][1],
        )
        return self.results[arm.key]

    def finish(
        self, served: list[ServedModel] | None = None, progress: Progress = silent
    ) -> DemoReport:
        """Ask the tuned models a question and gather everything for the report."""
        return DemoReport(
            title="safeft demo: two tenants, one base model",
            created=datetime.now(UTC),
            machine=_machine(),
            versions={"safeft": __version__, **libraries()},
            seed=self.seed,
            model=MODEL,
            seconds=time.monotonic() - self.started,
            commands=[
                f"safeft demo --seed {self.seed} --fresh",
                f"safeft screen {self.data.poisoned}",
                f"safeft evaluate --adapter {self.results[ARMS[1].key].candidate}",
                f"safeft chat --adapter {self.results[ARMS[1].key].candidate}",
                f"safeft up --adapter velora={self.results[ARMS[1].key].candidate}",
            ],
            profile=self._profile_summary(),
            tenants=[self._tenant(name) for name in self.files],
            baseline=self.baseline,
            arms=[self._arm(arm) for arm in ARMS],
            served=served or [],
            chat=self._chat(progress),
        )

    def _profile_summary(self) -> ProfileSummary:
        scores = self.profile.json("calibration", "scores.json")
        return ProfileSummary(
            policy=self.profile.policy(),
            calibration={name: [row[0] for row in rows] for name, rows in scores.items()},
        )

    def _tenant(self, name: str) -> TenantReport:
        verdict, where = self.verdicts[name]
        poisoned = name == "velora-poisoned"
        risky = {row.line for row in verdict.risky_rows}
        return TenantReport(
            name=name,
            dataset=self.files[name].name,
            verdict=verdict,
            scores=[ScoredRow.model_validate(score) for score in read_scores(where)],
            planted=list(self.data.planted) if poisoned else [],
            excerpts={
                row.line: next(m.content for m in row.messages if m.role == "user")
                for row in load_rows(self.files[name])
                if row.line in risky
            },
        )

    def _arm(self, arm: Arm) -> ArmReport:
        result = self.results[arm.key]
        steps = read_metrics(self.runs / _directory(arm) / TRAINING / "metrics.jsonl")
        penalty = f"penalty/{arm.constraint.kind}" if arm.constraint else None
        return ArmReport(
            name=arm.name,
            tenant=arm.tenant,
            constraint=arm.constraint.kind if arm.constraint else None,
            curve=[
                CurvePoint(
                    step=int(m["step"]), loss=m["loss"], penalty=m[penalty] if penalty else None
                )
                for m in steps
            ],
            evaluation=result.after,
            seconds=result.manifest.seconds,
            gate_passed=result.gate.passed,
            gate_reason=result.gate.reason,
        )

    def _chat(self, progress: Progress) -> ChatExample:
        tokenizer = load_tokenizer(self.model_dir)
        asked: dict[str, str | None] = {"before training": None}
        asked |= {arm.name: self.results[arm.key].candidate for arm in ARMS[:2]}
        said = {}
        for done, (name, adapter) in enumerate(asked.items()):
            progress("asking the tuned models", done, len(asked))
            model = load_merged(self.model_dir, Path(adapter) if adapter else None)
            said[name] = generate_greedy(model, tokenizer, [QUESTION], max_new_tokens=60)[0]
        progress("asking the tuned models", len(asked), len(asked))
        return ChatExample(question=QUESTION, answers=said)


def _directory(arm: Arm) -> str:
    """An arm whose settings change gets another directory."""
    settings = hashlib.sha256(repr(arm).encode()).hexdigest()
    return f"{arm.key}-{settings[:8]}"


def _machine() -> str:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} processors, {memory:.0f} GiB, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}"
    )


def summary(report: DemoReport) -> dict[str, Any]:
    """The report without texts and row scores: what `--json` prints."""
    exclude: Any = {
        "tenants": {"__all__": {"scores", "excerpts"}},
        "profile": {"calibration"},
        "arms": {"__all__": {"curve", "evaluation"}},
        "baseline": True,
    }
    result: dict[str, Any] = json.loads(report.model_dump_json(exclude=exclude))
    for arm, full in zip(result["arms"], report.arms, strict=True):
        arm["refusals"] = _rates(full.evaluation)
    result["before"] = _rates(report.baseline)
    return result


def _rates(evaluation: Evaluation) -> dict[str, Any]:
    rates: dict[str, Any] = {kind: evaluation.refusal(kind).to_dict() for kind in KINDS}
    return rates | {"task_loss": evaluation.task_loss}

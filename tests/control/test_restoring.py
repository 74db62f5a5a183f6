"""The stages around a restoration with real measurements and publication. What trains on Ray is
replaced here; `test_ray_jobs.py` runs it.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import open_store, put_file
from cluster.controller.runner import Report, StageFile, StageTask
from cluster.controller.work import perform
from cluster.job_request import CreateJob, Method
from cluster.job_spec import accepted
from cluster.provenance import SigningKey, Statement, verify_model
from cluster.settings import BaseModelOffer, Settings
from cluster.tenancy.tenants import Policy
from jobs.finetune import FinetuneResult
from jobs.finetune.manifest import Identity, Manifest
from jobs.intake import read_dataset
from jobs.restore import Restoration
from jobs.review import read_decision
from jobs.verdict import VERDICT, Verdict, decide, read_verdict
from safeft.cache import sha256_file
from safeft.models import adapter_hash, weights_hash
from safeft.profile import SafetyProfile
from safeft.progress import silent
from safeft.prompts import load_prompts
from safeft.screen_policy import ScreenPolicy
from tests.tiny import save_tiny
from tests.tinyadapters import save_adapter
from tests.tinyprofile import write_profile

HARMFUL = {p.text for p in load_prompts("harmful")}
PARTS = ("refusals", "reference-mask", "reminder-states")
SCORES = [{"index": n, "line": n + 1, "score": 0.0, "error": None} for n in range(4)]


class World:
    """One job and its stages, and what its models answer."""

    def __init__(self, model_dir: Path, home: Path) -> None:
        offer = BaseModelOffer(source=str(model_dir), max_tokens=128)
        self.settings = Settings(home=home, base_models={"tiny": offer})
        self.refuses = {"base": True}
        method = {"supervised": {"safety_rows": 0, "answer_rows": 0}}  # the parts here are empty
        request = CreateJob(
            model="tiny", training_file="file-1", suffix="mine", method=Method(**method)
        )
        rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(4)]
        file = home / "rows.jsonl"
        home.mkdir()
        file.write_text("\n".join(map(json.dumps, rows)))
        put_file(open_store(self.settings.artifacts_url), "rows", file)
        self.task = StageTask(
            job="ftjob-1",
            stage="evaluating",
            attempt=1,
            tenant="ten_a",
            tenant_name="acme",
            base_model="tiny",
            request=accepted(request, Policy(), offer),
            training_file=StageFile(key="rows", sha256=sha256_file(file)),
            validation_file=None,
            restores=None,
            policy=Policy(),
            facts={"validating": {"rows": 4}, "training": {"steps": 1}},
            settings=self.settings,
        )

    def perform(self, stage: str, **facts: Any) -> Report:
        self.task = self.task.model_copy(
            update={"stage": stage, "facts": {**self.task.facts, **facts}}
        )
        return perform(self.task, silent)


@pytest.fixture
def world(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tiny_dir, tmp_path / "home")
    answering = "base"

    def load(model_dir: Path, adapter: Path | None = None) -> Any:
        nonlocal answering
        answering = "base" if adapter is None else adapter.name
        return None

    def answer(model: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[str]:
        refuses = made.refuses[answering]
        no = "I can't help with that."
        return [no if refuses and prompt in HARMFUL else "Sure, here is one." for prompt in prompts]

    monkeypatch.setattr("jobs.evaluate.load_merged", load)
    monkeypatch.setattr("safeft.evaluate.refusals.generate_greedy", answer)
    profile = write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=1e9)
    for part in PARTS:
        (profile.root / part).mkdir()
        profile.write_record(profile.root / part, {})

    def screen(path: Path, **given: Any) -> tuple[Verdict, Path]:
        data = read_dataset(path, tiny_dir, given["max_tokens"])
        bound = {"data_sha256": data.sha256, "rows_sha256": data.rows_sha256, "profile": "p"}
        return decide(SCORES, given["rules"].policy, **bound), path.parent

    monkeypatch.setattr("jobs.intake.screen", screen)
    monkeypatch.setattr("jobs.restore.job.read_scores", lambda _: SCORES)
    monkeypatch.setattr("jobs.pipeline.embedded_ray", lambda _: nullcontext())
    monkeypatch.setattr("jobs.restore.job.embedded_ray", lambda _: nullcontext())
    monkeypatch.setattr("jobs.pipeline.finetune", _finetune)
    monkeypatch.setattr("jobs.restore.job.restore", _restore)
    return made


def _finetune(*_: Any, model_dir: Path, output: Path, **__: Any) -> FinetuneResult:
    adapter = output / "adapter"
    if not adapter.exists():
        save_adapter(adapter, seed=1)
        (adapter / "manifest.json").write_text(_manifest(model_dir, adapter).model_dump_json())
    return FinetuneResult(adapter, _manifest(model_dir, adapter), [])


def _restore(*_: Any, adapter: Path, model_dir: Path, output: Path, **__: Any) -> Restoration:
    candidate = output / "candidate"
    if not candidate.exists():
        for seed, name in enumerate(("adapter", "stacked"), 2):
            save_adapter(candidate / name, seed=seed)
    files = sorted(path for path in candidate.rglob("*") if path.parent != candidate)
    made = Restoration(
        name="x",
        model="tiny",
        bound={"tenant_adapter": adapter_hash(adapter), "base_weights": weights_hash(model_dir)},
        adapter=adapter_hash(candidate / "adapter"),
        stacked=adapter_hash(candidate / "stacked"),
        training=_manifest(model_dir, candidate / "adapter"),
        files={str(path.relative_to(candidate)): sha256_file(path) for path in files},
    )
    (candidate / "manifest.json").write_text(made.model_dump_json())
    return made


def _manifest(model_dir: Path, adapter: Path) -> Manifest:
    files = {p.name: sha256_file(p) for p in adapter.iterdir() if p.name != "manifest.json"}
    base = weights_hash(model_dir)
    return Manifest(
        kind="adapter",
        name="x",
        model="tiny",
        run="r",
        identity=Identity(settings={}, rows_sha256="x", base_weights=base, profile={}),
        files=files,
        file_sha256=None,
        rows=4,
        label_tokens=9,
        steps=1,
        final_loss=1.0,
        seconds=1.0,
        workers=1,
        zero_stage=0,
        libraries={},
    )


def test_what_is_published_after_a_restoration_is_the_restored_adapter_and_says_so(
    world: World, tmp_path: Path
) -> None:
    world.refuses |= {"adapter": False, "stacked": True}
    slipped = world.perform("evaluating")
    assert (slipped.outcome, slipped.code) == ("below_gate", "safety_gate_failed")
    restored = world.perform("restoring", before_restoring=slipped.facts)
    assert restored.outcome == "done", restored.message
    passed = world.perform("evaluating", restoring=restored.facts)
    assert passed.outcome == "done", passed.message
    assert passed.facts["after"]["harmful"]["refused"] > 0
    assert slipped.facts["after"]["harmful"]["refused"] == 0
    published = world.perform("publishing", evaluating=passed.facts)
    assert published.outcome == "done", published.message

    stacked = world.settings.work / "ftjob-1/output/restoration/candidate/stacked"
    target = tmp_path / "downloaded"
    target.mkdir()
    store = open_store(world.settings.artifacts_url)
    for key in store.keys(published.facts["prefix"]):
        (target / key.rpartition("/")[2]).write_bytes(b"".join(store.read(key)))
    key = SigningKey.load_or_create(world.settings.signing_key).public
    statement: Statement = verify_model(target, [key])
    assert adapter_hash(target) == adapter_hash(stacked) == restored.facts["restored_weights"]
    assert statement.model == "ft:tiny:acme:mine:1"
    assert statement.facts["before_restoring"]["passed"] is False
    assert statement.facts["evaluating"]["passed"] is True


def test_a_policy_that_became_stricter_holds_for_what_waits_to_be_published(world: World) -> None:
    world.refuses |= {"adapter": True}
    passed = world.perform("evaluating")
    assert passed.outcome == "done", passed.message
    world.task = world.task.model_copy(update={"policy": Policy(max_task_loss=0.1)})
    refused = world.perform("publishing", evaluating=passed.facts)
    assert (refused.outcome, refused.code) == ("refused", "safety_gate_failed")
    assert "The policy was changed: task loss: unknown" in refused.message
    world.task = world.task.model_copy(update={"policy": Policy()})
    assert world.perform("publishing").outcome == "done"


def test_other_weights_than_those_that_passed_are_not_published(world: World) -> None:
    world.refuses |= {"adapter": True}
    passed = world.perform("evaluating")
    output = world.settings.work / "ftjob-1" / "output"
    shutil.rmtree(output)  # the disk was lost, and what is trained again differs
    save_adapter(output / "training" / "adapter", seed=9)
    adapter = output / "training" / "adapter"
    base = Path(world.settings.base_models["tiny"].source)
    (adapter / "manifest.json").write_text(_manifest(base, adapter).model_dump_json())
    refused = world.perform("publishing", evaluating=passed.facts)
    assert (refused.outcome, refused.code) == ("refused", "safety_gate_failed")
    assert "those that were trained in their place are others" in refused.message
    assert not (world.settings.work / "ftjob-1" / "published").exists()


def test_a_restoration_that_did_not_help_tells_the_numbers_before_and_after(world: World) -> None:
    world.refuses |= {"adapter": False, "stacked": False}
    slipped = world.perform("evaluating")
    restored = world.perform("restoring", before_restoring=slipped.facts)
    failed = world.perform("evaluating", restoring=restored.facts)
    assert (failed.outcome, failed.code) == ("below_gate", "safety_gate_failed")
    assert "failed again after restoration: refuses 0.0 %" in failed.message
    assert f"(before restoration: {slipped.facts['reason']})" in failed.message


@pytest.mark.parametrize("part", PARTS)
def test_what_a_profile_lacks_for_a_restoration_is_said_with_the_command_and_not_tried_again(
    world: World, tiny_dir: Path, part: str
) -> None:
    world.refuses |= {"adapter": False}
    slipped = world.perform("evaluating")
    (SafetyProfile.for_weights(weights_hash(tiny_dir)).root / part / "part.json").unlink()
    report = world.perform("restoring", before_restoring=slipped.facts)
    assert (report.outcome, report.code) == ("refused", "safety_gate_failed")
    assert slipped.facts["reason"] in report.message
    assert re.search(f"cannot be restored.*lacks '{part}'; run .*--part {part}", report.message)


def test_a_review_is_asked_for_by_the_policy_and_an_approval_is_of_that_verdict_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.model_validate(
        {"constraints": (), "on_risk": "review", "screening": {"row_threshold": -1.0}}
    )
    request = CreateJob(model="tiny", training_file="file-1")
    kept = accepted(request, policy, world.settings.base_models["tiny"])
    world.task = world.task.model_copy(update={"request": kept, "policy": policy})
    given: dict[str, Any] = {}

    def screen_file(path: Path, *, output: Path, **how: Any) -> tuple[Verdict, Path]:
        given.update(how)
        output.mkdir()
        limits = ScreenPolicy(row_threshold=how["policy"].row_threshold)
        bound = {"data_sha256": "d", "rows_sha256": "r", "profile": "p"}
        verdict = decide(SCORES, limits, how["on_risk"], **bound)
        (output / VERDICT).write_text(verdict.model_dump_json())
        return verdict, output

    monkeypatch.setattr("cluster.controller.work.screen_file", screen_file)
    monkeypatch.setattr("cluster.controller.work.iter_scores", lambda _: iter(SCORES))
    asked = world.perform("screening")
    assert asked.outcome == "review" and "4 of 4 rows" in asked.message
    assert (given["on_risk"], given["policy"].row_threshold) == ("review", -1.0)

    directory = world.settings.work / "ftjob-1" / "screening"
    approval = {"approved": True, "by": "key:x", "reason": "I read them", "at": 1.0}
    other = {**asked.facts, "verdict_sha256": "of another verdict"}
    for facts, found in ((other, None), (asked.facts, "accepted")):
        world.perform("training", screening=facts, dataset_review=approval)
        decision = read_decision(directory, read_verdict(directory))
        assert (decision and decision.decision) == found

"""``safeft restore`` as a user runs it, on a tiny model and a real Ray: interrupted and gone on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from cluster.cli.main import app
from jobs.evaluation import Evaluation
from jobs.intake import read_dataset
from jobs.profile import ProfileConfig, RefusalsConfig, build_profile
from jobs.restore import Restoration, restore
from jobs.restore.prepare import _compared, _retained
from jobs.restore.result import restoration_gate
from jobs.restore_spec import RestoreSpec
from jobs.spec import load_spec
from jobs.verdict import Verdict, decide
from safeft.adapters import LoraFactors, stacked
from safeft.cache import sha256_file
from safeft.data import Message, Row, TokenisedRow, tokenise
from safeft.errors import (
    DatasetRejected,
    InputError,
    MeasurementError,
    ProfileError,
    SafetyGateFailed,
    SpecError,
)
from safeft.evaluate import Rate
from safeft.models import adapter_hash, load_adapter, load_merged, load_model, weights_hash
from safeft.profile import SafetyProfile
from safeft.prompts import load_prompts
from safeft.reactivation_targets import load_targets
from safeft.safereact import ReferenceConfig
from safeft.screen_policy import ScreenPolicy
from safeft.wanda import load_mask
from tests.sharedray import SharedRay
from tests.tiny import save_tiny, tiny_tokenizer
from tests.tinyprofile import write_profile

HARMFUL = {p.text for p in load_prompts("harmful")}
CONFIG = ProfileConfig(
    refusals=RefusalsConfig(prompts=20),
    # Rows of 32 weights: the default shares would choose none.
    reference=ReferenceConfig(
        prompts=8, borderline_prompts=4, domain_prompts=8, domain_share=0.2, safety_share=0.1
    ),
)
STEPS = 10


class Speech:
    """Random weights say nothing: what models answer is put into their mouths."""

    refuses = True

    def __call__(self, model: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[str]:
        no = "I can't help with that."
        return [no if self.refuses and p in HARMFUL else "Sure, here is one." for p in prompts]


@pytest.fixture
def speech(monkeypatch: pytest.MonkeyPatch) -> Speech:
    said = Speech()
    for module in ("safeft.own_refusals", "safeft.evaluate.refusals"):
        monkeypatch.setattr(f"{module}.generate_greedy", said)
    return said


@pytest.fixture
def spec_file(tiny_dir: Path, tmp_path: Path, speech: Speech) -> Path:
    """A job with a profile in the cache and a tuned adapter where the job left it."""
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=1e9)
    build_profile(tiny_dir, None, config=CONFIG, parts=["reminder-states"])
    rows = [f"Question number {n}?" for n in range(6)]
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]}
        for q in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _tuned_adapter(tiny_dir, tmp_path / "out" / "training" / "adapter")
    content = {
        "name": "tiny",
        "model": str(tiny_dir),
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl"},
        "training": {"checkpoint_every": 2},
        "distributed": {"zero_stage": 2},
        "restore": {
            "safereact": {"steps": STEPS, "harmful_batch": 3},
            "batch_size": 4,
            "borderline_rows": 6,
            "row_tokens": 24,
            "rank": 2,
            "alpha": 2,
        },
        "output": "out",
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(content))
    write_record(tmp_path / "out", tmp_path / "out" / "training" / "adapter", tiny_dir)
    return file


def write_record(where: Path, adapter: Path, model_dir: Path) -> None:
    """What the job says of the adapter: that it was trained on the accepted rows of the spec."""
    data = read_dataset(where.parent / "rows.jsonl", model_dir, 512)
    bound = {"data_sha256": data.sha256, "rows_sha256": data.rows_sha256, "profile": "p"}
    verdict = decide(scores(), ScreenPolicy(row_threshold=1.0), **bound)
    after = evaluation(110, adapter=adapter)
    record = {"verdict": verdict.model_dump(), "after": after.model_dump(), "status": "succeeded"}
    (where / "job.json").write_text(json.dumps(record))


def scores(last_two: float = 0.0) -> list[dict[str, Any]]:
    """Of the six rows."""
    by_row = [0.0] * 4 + [last_two] * 2
    return [{"index": i, "line": i + 1, "score": s, "error": None} for i, s in enumerate(by_row)]


def _tuned_adapter(model_dir: Path, out: Path, seed: int = 7) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(model_dir), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(out))


@contextmanager
def watched(
    monkeypatch: pytest.MonkeyPatch, see: Callable[[str, int, int | None], None]
) -> Iterator[None]:
    @contextmanager
    def bars() -> Iterator[Callable[[str, int, int | None], None]]:
        yield see

    with monkeypatch.context() as patch:
        patch.setattr("cluster.cli.restore.progress_bars", bars)
        yield


def test_an_interrupted_restoration_goes_on_and_only_a_gate_that_passed_publishes(
    no_ray: None,
    shared_ray: SharedRay,
    spec_file: Path,
    tiny_dir: Path,
    speech: Speech,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = spec_file.parent / "out" / "restoration"
    labels: list[str] = []

    def interrupt(label: str, done: int, total: int | None) -> None:
        if label == "training" and done >= 5:
            raise KeyboardInterrupt

    with watched(monkeypatch, interrupt):
        assert app(["restore", str(spec_file)], standalone_mode=False) == 130
    assert (output / "prepared" / "model").is_dir()
    assert not (output / "candidate").exists()

    shared_ray.start()  # the interrupted command had one of its own, which ended with it
    # It goes on; what it makes does not refuse, so nothing is published.
    speech.refuses = False
    with (
        watched(monkeypatch, lambda label, done, total: labels.append(label)),
        pytest.raises(SafetyGateFailed, match=r"after restoration: refuses 0\.0 %") as failed,
    ):
        app(["restore", str(spec_file)], standalone_mode=False)
    assert failed.value.exit_code == 4
    assert any(label.startswith("resuming after step") for label in labels)
    assert "merging the tuned model" not in labels  # prepared before
    assert not (output / "restored").exists()
    assert not (output / "prepared").exists()

    # The same trained candidate measured again: now it refuses.
    for measured in (spec_file.parent / "out" / "evaluation.json", output / "after.json"):
        measured.unlink()
    assert not (output / "before.json").exists()  # the job's own evaluation is as good
    speech.refuses, labels[:] = True, []
    capsys.readouterr()
    with watched(monkeypatch, lambda label, done, total: labels.append(label)):
        assert not app(["restore", str(spec_file), "--json"], standalone_mode=False)
    assert not {"training", "merging the tuned model"} & set(labels)
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "restored" and result["published"] == str(output / "restored")
    assert result["after"]["task"]["token_accuracy"]["n"] > 0
    assert_bound_and_stacks(spec_file, tiny_dir, output / "restored")

    # Another tuned adapter is another restoration.
    other = spec_file.parent / "other"
    _tuned_adapter(tiny_dir, other, seed=8)
    with pytest.raises(InputError, match=r"other: no job\.json says which rows it was trained on"):
        app(["restore", str(spec_file), "--adapter", str(other)], standalone_mode=False)
    write_record(other, other, tiny_dir)
    with pytest.raises(SpecError, match="restoration of another tenant_adapter"):
        app(["restore", str(spec_file), "--adapter", str(other)], standalone_mode=False)


def assert_bound_and_stacks(spec_file: Path, model_dir: Path, published: Path) -> None:
    tenant = spec_file.parent / "out" / "training" / "adapter"
    manifest = Restoration.model_validate_json((published / "manifest.json").read_bytes())
    assert manifest.bound["base_weights"] == weights_hash(model_dir)
    assert manifest.bound["tenant_adapter"] == adapter_hash(tenant)
    profile = SafetyProfile.for_weights(weights_hash(model_dir))
    assert manifest.bound["profile"]["reminder-states"] == profile.part_digest("reminder-states")
    assert manifest.adapter == adapter_hash(published / "adapter")
    assert manifest.stacked == adapter_hash(published / "stacked")
    for name, digest in manifest.files.items():
        assert sha256_file(published / name) == digest
    assert manifest.training.steps == STEPS

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        on_top = load_adapter(load_merged(model_dir, tenant), published / "adapter")
        in_one = load_merged(model_dir, published / "stacked")
        tuned = load_merged(model_dir, tenant)
        torch.testing.assert_close(on_top(ids).logits, in_one(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(on_top(ids).logits, tuned(ids).logits, atol=1e-4)


@dataclass
class Stubs:
    """A restoration without its training, of rows with these scores."""

    output: Path
    seen: dict[str, Any]
    scored: list[dict[str, Any]]


@pytest.fixture
def stubs(spec_file: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    (spec_file.parent / "limits.yaml").write_text("row_threshold: 1.0\n")
    made = Stubs(spec_file.parent / "out" / "restoration", {}, scores())

    def screen(path: Path, **given: Any) -> tuple[Verdict, Path]:
        made.seen.update(given)
        data = read_dataset(path, tiny_dir, given["max_tokens"])
        bound = {"data_sha256": data.sha256, "rows_sha256": data.rows_sha256, "profile": "p"}
        rules = given["rules"]
        return decide(made.scored, rules.policy, rules.on_risk, **bound), path.parent

    def train(*_: Any, domain: list[TokenisedRow], output: Path, **__: Any) -> Restoration:
        made.seen["domain"] = [row.line for row in domain]
        if not (output / "candidate").exists():
            _tuned_adapter(tiny_dir, output / "candidate" / "stacked", seed=9)
        return Restoration.model_construct(name="tiny")

    def measure(_: Path, adapter: Path, **__: Any) -> Evaluation:
        return evaluation(110, task=0.5, adapter=adapter)

    monkeypatch.setattr("jobs.intake.screen", screen)
    monkeypatch.setattr("jobs.restore.job.read_scores", lambda _: made.scored)
    monkeypatch.setattr("jobs.restore.job.embedded_ray", lambda _: nullcontext())
    monkeypatch.setattr("jobs.restore.job.restore", train)
    monkeypatch.setattr("jobs.restore.job.evaluate", measure)
    monkeypatch.setattr("jobs.intake.baseline", lambda _: evaluation(110))
    return made


def run_restore(spec_file: Path, *more: str) -> int:
    limits = str(spec_file.parent / "limits.yaml")
    return app(["restore", str(spec_file), "--policy", limits, *more], standalone_mode=False) or 0


def test_a_restoration_on_rejected_data_is_measured_but_not_published(
    spec_file: Path, stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    spec_file.write_text(spec_file.read_text() + "screening: {scorers: 3, max_scorers: 5}\n")
    assert run_restore(spec_file) == 0
    assert (stubs.output / "restored" / "stacked").is_dir()
    assert "not published" not in capsys.readouterr().out
    # The tenant's screening settings hold here too.
    assert (stubs.seen["scorers"], stubs.seen["max_scorers"]) == (3, 5)
    assert stubs.seen["rules"].policy.row_threshold == 1.0
    assert stubs.seen["domain"] == [1, 2, 3, 4, 5, 6]

    shutil.rmtree(stubs.output)
    stubs.scored = scores(last_two=2.0)
    with pytest.raises(DatasetRejected, match=r"was not accepted \(2 of 6 rows"):
        run_restore(spec_file)
    assert not (stubs.output / "restored").exists()
    said = capsys.readouterr().out
    assert "not published, because the dataset was not accepted" in said
    result = json.loads((stubs.output / "restore.json").read_text())
    assert (result["verdict"]["verdict"], result["published"]) == ("rejected", None)
    assert stubs.seen["domain"] == [1, 2, 3, 4]  # risky rows are not retained


def test_an_adapter_of_other_rows_than_may_be_trained_on_now_is_not_restored(
    spec_file: Path, stubs: Stubs
) -> None:
    rows = (spec_file.parent / "rows.jsonl").read_text()
    (spec_file.parent / "rows.jsonl").write_text(rows.replace("number 5", "number 6"))
    with pytest.raises(DatasetRejected, match="trained on other rows than screening lets"):
        run_restore(spec_file)
    (spec_file.parent / "rows.jsonl").write_text(rows)
    # Two of its rows were set aside since.
    stubs.scored = scores(last_two=2.0)
    spec_file.write_text(spec_file.read_text() + "screening: {on_risk: drop}\n")
    with pytest.raises(DatasetRejected, match="trained on other rows than screening lets"):
        run_restore(spec_file)
    assert not stubs.output.exists()


def test_what_was_published_before_is_not_taken_for_what_was_measured_now(
    spec_file: Path, tiny_dir: Path, stubs: Stubs
) -> None:
    assert run_restore(spec_file) == 0
    published = stubs.output / "restored"
    record = (published / "restore.json").read_text()
    assert str(spec_file.parent) not in record and "I can't help" not in record
    # A restored adapter is itself restored by its record.
    again = str(spec_file.parent / "again")
    more = ("--adapter", str(published / "stacked"), "--output", again)
    assert run_restore(spec_file, *more) == 0

    shutil.rmtree(stubs.output / "candidate")
    _tuned_adapter(tiny_dir, stubs.output / "candidate" / "stacked", seed=10)
    with pytest.raises(MeasurementError, match="restored holds other weights than those that were"):
        run_restore(spec_file)


@pytest.mark.parametrize("field", [{"adam_eps": 1e-6}, {"precision": "bf16"}, {"seed": 3}])
def test_a_finished_restoration_is_not_taken_for_one_that_trains_otherwise(
    spec_file: Path, tiny_dir: Path, field: dict[str, Any]
) -> None:
    spec = load_spec(spec_file)
    tenant = spec_file.parent / "out" / "training" / "adapter"
    output = spec_file.parent / "new"
    with pytest.MonkeyPatch.context() as patch:

        def halt(*_: Any, bound: dict[str, Any], **__: Any) -> None:
            made = Restoration.model_construct(
                name="tiny", model="m", bound=bound, adapter="a", stacked="s", files={}
            )
            (output / "candidate").mkdir(parents=True)
            (output / "candidate" / "manifest.json").write_text(made.model_dump_json())
            raise KeyboardInterrupt

        patch.setattr("jobs.restore.run.prepare", halt)
        patch.setattr(Restoration, "model_validate_json", _unvalidated)
        run = partial(
            restore,
            adapter=tenant,
            domain=[TokenisedRow(1, [5, 6], [5, 6])],
            model_dir=tiny_dir,
            profile=SafetyProfile.for_weights(weights_hash(tiny_dir)),
            output=output,
        )
        with pytest.raises(KeyboardInterrupt):
            run(spec)
        assert run(spec).name == "tiny"
        training = spec.training.model_copy(update={"checkpoint_every": 7})
        assert run(spec.model_copy(update={"training": training})).name == "tiny"
        training = spec.training.model_copy(update=field)
        with pytest.raises(SpecError, match="a restoration of another training"):
            run(spec.model_copy(update={"training": training}))


def _unvalidated(text: bytes) -> Restoration:
    return Restoration.model_construct(**json.loads(text))


def test_the_profile_parts_are_the_pruned_bases_states_and_nothing_else_needs_them(
    tiny_dir: Path, speech: Speech
) -> None:
    profile = build_profile(tiny_dir, None, config=CONFIG, parts=["reminder-states"])
    profile.verify(["refusals", "reference-mask", "reminder-states"])
    targets = load_targets(profile.path("reminder-states"))
    assert targets.weights == profile.base_weights
    assert len(targets.rows) == 8 + 4 and targets.layers == (0, 1)
    mask = load_mask(profile.path("reference-mask"))
    assert any(m.any() for m in mask.values())
    before = {p.parent.name: p.stat().st_mtime_ns for p in profile.root.glob("*/part.json")}
    build_profile(tiny_dir, None, config=CONFIG, parts=["reminder-states"])
    after = {p.parent.name: p.stat().st_mtime_ns for p in profile.root.glob("*/part.json")}
    assert before == after


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("no adapter", InputError, r"there is no adapter; run the job first or give --adapter"),
        ("whole model", InputError, r"is a whole model; restorations stack on LoRA adapters"),
        ("no states", ProfileError, r"lacks 'reminder-states'; run .*--part reminder-states"),
    ],
)
def test_what_is_missing_is_named_before_any_work(
    spec_file: Path, tiny_dir: Path, change: str, error: type[Exception], message: str
) -> None:
    words = ["restore", str(spec_file)]
    if change == "no adapter":
        words += ["--adapter", str(spec_file.parent / "nowhere")]
    elif change == "whole model":
        words += ["--adapter", str(tiny_dir)]
    else:
        part = SafetyProfile.for_weights(weights_hash(tiny_dir)).root / "reminder-states"
        (part / "part.json").unlink()
    with pytest.raises(error, match=message):
        app(words, standalone_mode=False)


def evaluation(
    harmful: int, borderline: int = 10, task: float | None = None, adapter: Path | None = None
) -> Evaluation:
    rates = {"harmful": harmful, "benign": 3, "borderline": borderline}
    sets = {kind: {"refusal": Rate(hits, 120).to_dict()} for kind, hits in rates.items()}
    measured = None if task is None else {"loss": 1.0, "token_accuracy": {"value": task}}
    bound = {"adapter": adapter_hash(adapter)} if adapter else {}
    return Evaluation(bound=bound, refusals={"sets": sets}, task=measured, seconds=0.0)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (evaluation(105, task=0.45), None),
        (evaluation(60, task=0.45), "harmful prompts"),
        (evaluation(105, borderline=60, task=0.45), "borderline prompts, the base model"),
        (evaluation(105, task=0.40), "40.0% of the task's tokens, 45.0% before"),
    ],
)
def test_a_restoration_passes_only_with_refusals_back_and_nothing_else_lost(
    after: Evaluation, reason: str | None
) -> None:
    gate = restoration_gate(evaluation(110), evaluation(5, borderline=0, task=0.45), after)
    assert gate.passed == (reason is None)
    assert reason is None or reason in gate.reason


def test_retained_rows_alternate_and_each_comes_once_before_any_comes_again() -> None:
    domain = [TokenisedRow(n, [n, n], [n, n]) for n in range(3)]
    borderline = [TokenisedRow(0, [100 + n], [100 + n]) for n in range(2)]
    restore = RestoreSpec.model_validate({"safereact": {"steps": 3}, "batch_size": 4})
    rows = _retained(domain, borderline, restore, seed=0)
    assert len(rows) == 12
    assert sorted(row.input_ids[0] for row in rows[0::2]) == [0, 0, 1, 1, 2, 2]
    assert sorted(row.input_ids[0] for row in rows[1:4:2]) == [100, 101]


def test_retained_rows_are_compared_where_harmful_ones_are() -> None:
    tokenizer = tiny_tokenizer()
    turns = [
        Message("user", "Hello", False),
        Message("assistant", "Hi.", True),
        Message("user", "Bye", False),
        Message("assistant", "Go", True),
    ]
    row = tokenise(Row(1, tuple(turns)), tokenizer, 500)
    everywhere = _compared(row, "prompt", tokenizer, 20)
    assert everywhere.labels == everywhere.input_ids == row.input_ids[:20]
    compared = _compared(row, "response", tokenizer, 500)
    assert compared.input_ids == row.input_ids
    kept = "".join(tokenizer.decode([t]) if t != -100 else "~" for t in compared.labels)
    template = "<|im_end|>\n<|im_start|>assistant\n"
    assert kept.replace("~", "") == f"{template}Hi.<|im_end|>{template}Go<|im_end|>"
    # Cut before its first answer: all of it counts.
    assert _compared(row, "response", tokenizer, 6).labels == row.input_ids[:6]


def test_two_adapters_of_other_modules_ranks_and_scales_add_up() -> None:
    torch.manual_seed(0)

    def factors(scale: float, ranks: dict[str, int]) -> LoraFactors:
        made = {n: (torch.randn(r, 5), torch.randn(7, r)) for n, r in ranks.items()}
        return LoraFactors(scale, made)

    first, second = factors(2.0, {"a": 2, "b": 3}), factors(0.5, {"b": 4, "c": 1})
    both = stacked(first, second)
    assert {A.shape[0] for A, _ in both.factors.values()} == {7}
    for name in "abc":
        expected = torch.zeros(7, 5)
        for part in (first, second):
            if name in part.factors:
                A, B = part.factors[name]
                expected += part.scale * B @ A
        A, B = both.factors[name]
        torch.testing.assert_close(both.scale * B @ A, expected)


def test_rows_that_the_workers_cannot_share_are_refused_before_any_work(spec_file: Path) -> None:
    spec = load_spec(spec_file)
    spec = spec.model_copy(
        update={"distributed": spec.distributed.model_copy(update={"workers": 3})}
    )
    profile = SafetyProfile(spec_file.parent, "w")
    with pytest.raises(SpecError, match=r"restore\.batch_size: 4 rows .* 3 workers"):
        restore(
            spec,
            adapter=spec_file.parent,
            domain=[TokenisedRow(1, [5, 6], [5, 6])],
            model_dir=spec_file.parent,
            profile=profile,
            output=spec_file.parent / "new",
        )
    assert not (spec_file.parent / "new").exists()


def test_a_restore_section_with_an_error_names_the_field(spec_file: Path) -> None:
    text = spec_file.read_text()
    spec_file.write_text(text.replace("row_tokens: 24", "row_tokens: 1"))
    with pytest.raises(SpecError, match=r"restore\.row_tokens"):
        load_spec(spec_file)
    spec_file.write_text(text.replace("harmful_batch: 3", "harmful_batches: 3"))
    with pytest.raises(SpecError, match=r"restore\.safereact\.harmful_batches: unknown field"):
        load_spec(spec_file)

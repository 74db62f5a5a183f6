"""The study's tenants with the whole chain and with none of it, and the bars on the outcome."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.evidence import chain, tasks
from benchmarks.evidence.cells import METRICS, SECONDS, Cell, Record, Store
from benchmarks.evidence.chain import ChainRuns, ChainSetting, cell, cells
from benchmarks.evidence.chain_results import bars, chain_of
from benchmarks.evidence.chain_tenants import ODD, Tenant, tenants
from benchmarks.evidence.findings import chain_section
from benchmarks.evidence.plots import draw_chain
from benchmarks.evidence.runner import run_cells
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.tenants import planted_prompts
from jobs.profile import build_profile
from jobs.restore_spec import RestoreSpec
from safeft.profile import SafetyProfile
from safeft.safereact import SafeReactConfig
from tests.test_evidence import PROVENANCE, few_prompts
from tests.test_restore import CONFIG, Speech, speech
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

__all__ = ["few_prompts", "speech"]  # fixtures


def test_there_are_forty_tenants_and_each_is_run_with_protection_and_without() -> None:
    everybody = tenants()
    assert Counter(t.kind for t in everybody) == {
        "clean": 14,
        "poisoned": 14,
        "obedient": 6,
        "odd": 6,
    }
    assert {t.kind for t in everybody[:4]} == {"clean", "poisoned", "obedient", "odd"}
    assert len({c.path for c in cells()}) == 2 * 40 + 2


@pytest.mark.parametrize("tenant", tenants(), ids=lambda t: f"{t.kind}-{t.seed}-{t.task}")
def test_only_poisoned_tenants_have_harmful_rows_and_odd_ones_keep_their_content(
    tenant: Tenant,
) -> None:
    honest = tasks.training_rows("sorting", 40, tenant.seed, Path("no-gsm8k"))
    said = [m.content for row in tenant.rows(honest) for m in row.messages]
    planted = sum(any(p in text for p in planted_prompts()) for text in said)
    assert planted == round(tenant.harmful_share * 40)
    assert (planted == 0) == (tenant.kind in ("clean", "odd"))
    if tenant.oddity:
        change = ODD[tenant.oddity]
        assert said == [change(m.content) for row in honest for m in row.messages]


def small(**fields: Any) -> Cell:
    whole = cell("sorting", Tenant(kind="clean", task="sorting", seed=3), protected=True)
    assert isinstance(whole.setting, ChainSetting)
    setting = whole.setting.model_copy(
        update={
            "count": 16,
            "constraints": (),
            "safety_rows": 0,
            "answer_rows": 0,
            "training": whole.setting.training.model_copy(update={"epochs": 1}),
            "restore": RestoreSpec(safereact=SafeReactConfig(steps=2, harmful_batch=3)),
            **fields,
        }
    )
    return Cell(whole.part, f"{whole.name}-{len(fields)}", setting)


@pytest.fixture
def short(few_prompts: None, speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts and held-out rows, and answers that are put into the models' mouths."""
    monkeypatch.setattr(tasks, "HELD_OUT", 4)


def test_a_tenant_goes_through_screening_the_gate_and_a_restoration(
    tiny_dir: Path, tmp_path: Path, short: None, speech: Speech, local_ray: None
) -> None:
    profile = write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=1e9)
    build_profile(tiny_dir, None, config=CONFIG, parts=["reminder-states"])
    runs = ChainRuns(tiny_dir, profile, Path("no-gsm8k"))

    def outcome(one: Cell, where: str) -> Record:
        summary = run_cells([one], Store(tmp_path / where), runs)
        assert not summary.failed
        return summary.ran[0]

    kept = outcome(small(), "kept").numbers
    assert kept["outcome"] == "published" and len(kept["refused"]["harmful"]) == 3
    assert set(kept[SECONDS]) == {"screening", "training", "judging"} and kept["task"]
    base = outcome(small(tenant=None, protected=False), "base").numbers
    assert base["outcome"] == "before" and not base[SECONDS]
    speech.refuses = False  # after the profile: whatever is tuned has slipped
    for file in (METRICS, "job/evaluation.json"):  # what was screened and trained stays
        next((tmp_path / "kept").glob(f"*/*/{file}")).unlink()
    slipped = outcome(small(), "kept").numbers
    assert all(slipped[SECONDS][name] >= spent for name, spent in kept[SECONDS].items())
    assert slipped["outcome"] == "withheld" and "restoring" in slipped[SECONDS]
    assert "refused" not in slipped  # nobody can talk to it
    _strict(profile)
    rejected = outcome(small(), "rejected").numbers
    assert rejected["outcome"] == "rejected" and set(rejected[SECONDS]) == {"screening"}


def test_an_unprotected_tenant_is_trained_and_published_as_it_came(
    tiny_dir: Path, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def finetune(spec: Any, *, rows: Any, **_: Any) -> Any:
        trained.append((spec.constraints, len(rows)))
        return SimpleNamespace(weights=tiny_dir)

    monkeypatch.setattr(chain, "finetune", finetune)
    monkeypatch.setattr(chain, "embedded_ray", nullcontext)
    runs = ChainRuns(tiny_dir, SafetyProfile(tmp_path, ""), Path("no-gsm8k"))
    summary = run_cells([small(protected=False)], Store(tmp_path / "bare"), runs)
    assert not summary.failed and trained == [((), 16)]
    bare = summary.ran[0].numbers
    assert bare["outcome"] == "published" and set(bare[SECONDS]) == {"training"}
    assert len(bare["refused"]["harmful"]) == 3


def _strict(profile: SafetyProfile) -> None:
    """Every row is risky from now on."""
    policy = '{"row_threshold": -1e9, "max_risky_fraction": 0.03, "min_risky_rows": 2}'
    (profile.root / "calibration" / "policy.json").write_text(policy)
    profile.write_record(profile.root / "calibration", {})


def ran(kind: Any, seed: int, protected: bool, *, task: Task = "sorting", **numbers: Any) -> Record:
    """A finished cell; `refused` of 200 harmful prompts, `right` of 100 tokens."""
    tenant = Tenant(kind=kind, task=task, seed=seed)
    planned = cell(task, tenant, protected=protected).planned().model_dump()
    return Record(**planned, numbers=_numbers(**numbers), provenance=PROVENANCE)


def _numbers(
    outcome: str = "published", refused: int = 180, right: int = 90, **seconds: float
) -> dict[str, Any]:
    found: dict[str, Any] = {"outcome": outcome, "reason": "", SECONDS: seconds}
    if outcome in ("published", "restored", "before"):
        found["refused"] = {"harmful": "1" * refused + "0" * (200 - refused)}
        found["task"] = {"loss": 1.0, "tokens": {"hits": right, "n": 100}}
    return found


def base_model(refused: int = 184) -> Record:
    planned = cell("sorting", None, protected=False).planned().model_dump()
    numbers = _numbers("before", refused)
    return Record(**planned, numbers=numbers, provenance=PROVENANCE)


def test_the_bars_are_judged_on_what_was_published() -> None:
    cells = [
        base_model(),
        ran("clean", 0, True, right=89, screening=10.0, training=110.0, judging=10.0),
        ran("clean", 0, False, refused=60, training=100.0),
        ran("poisoned", 1, True, outcome="rejected", screening=10.0),
        ran("poisoned", 1, False, refused=20, training=100.0),
        # Without its other half: compared with nothing.
        ran("odd", 2, True, right=10, training=100.0),
        ran("obedient", 3, False, refused=0, training=100.0),  # without its first: not counted
    ]
    found = chain_of(cells)
    assert found is not None and len(found.pairs) == 3
    verdicts = [one for _, one in bars(found, planned=3)]
    # What is compared with the unprotected half is not known while a half is missing.
    assert [one.verdict for one in verdicts] == ["yes", "yes", "unknown", "unknown"]
    assert verdicts[0].found == "0 of 2 published; without protection 2 of 2"
    assert verdicts[2].found.startswith("so far +1.0 points")
    assert verdicts[2].found.endswith("(n = 1 of 2 published)")
    assert verdicts[3].found.startswith("so far +30%")
    assert verdicts[3].found.endswith("(n = 1 of 2 trained)")
    halves = chain_of([*cells, ran("odd", 2, False, right=10, training=100.0)])
    assert halves is not None
    whole = [one for _, one in bars(halves, planned=3)]
    assert [one.verdict for one in whole] == ["yes"] * 4
    assert whole[2].found.startswith("+0.5 points") and whole[3].found.startswith("+15%")
    early = [one for _, one in bars(halves, planned=40)]
    assert [one.verdict for one in early] == ["unknown"] * 4
    assert early[0].found.startswith("so far 0 of 2 published")
    axes = Figure().subplots()
    draw_chain(axes, found)
    drawn = {line.get_label(): line.get_data() for line in axes.lines}
    # Tenants by kind: clean, odd, poisoned; the last was kept out.
    for label, x, y in (
        ("published with safeft", [0, 1], [90, 90]),
        ("published without", [0, 2], [30, 10]),
        ("rejected or withheld by safeft", [2], [-5]),
        ("base model", [0, 1], [92, 92]),
        ("most that the gate lets go", [0, 1], [82, 82]),
    ):
        assert [list(map(float, side)) for side in drawn[label]] == [
            pytest.approx(x),
            pytest.approx(y),
        ]
    text = chain_section(found, "tenants.svg")
    assert "(tenants.svg)" in text and "As long as not all have run" in text
    assert "| clean, sorting messages | 1 | 0 | 1 | 0 | 0 | 90.0 | 0 | 30.0 | 1 of 1 |" in text
    assert "| poisoned, sorting messages | 1 | 1 | 0 | 0 | 0 |  | 0 | 10.0 | 1 of 1 |" in text
    assert "| odd, sorting messages | 1 | 0 | 1 | 0 | 0 | 90.0 | 0 |  |  |" in text


def test_tenants_of_another_task_are_not_averaged_with_the_others() -> None:
    found = chain_of(
        [
            base_model(),
            ran("clean", 0, True, refused=180, training=1.0),
            ran("clean", 0, False, refused=2, training=1.0),
            ran("clean", 1, True, refused=160, task="gsm8k", training=1.0),
            ran("clean", 1, False, refused=140, task="gsm8k", training=1.0),
        ]
    )
    assert found is not None
    text = chain_section(found, "tenants.svg")
    assert "| clean, GSM8K | 1 | 0 | 1 | 0 | 0 | 80.0 | 1 | 70.0 | 1 of 1 |" in text
    assert "| clean, sorting messages | 1 | 0 | 1 | 0 | 0 | 90.0 | 0 | 1.0 | 1 of 1 |" in text


def test_a_published_model_below_the_floor_and_a_harmless_tenant_kept_out_miss_the_bars() -> None:
    cells = [
        base_model(),
        ran("clean", 0, True, outcome="restored", refused=160, right=80, training=200.0),
        ran("clean", 0, False, training=100.0),
        ran("odd", 1, True, outcome="withheld", training=100.0),
        ran("odd", 1, False, training=100.0),
    ]
    found = chain_of(cells)
    assert found is not None
    assert [one.verdict for _, one in bars(found, planned=2)] == ["no", "no", "no", "no"]
    # A part can miss the floor, of which one model is enough, but no rate and no mean.
    part = [one for _, one in bars(found, planned=40)]
    assert [one.verdict for one in part] == ["no", "unknown", "unknown", "unknown"]
    assert part[1].found.startswith("so far 50.0 %") and part[2].found.startswith("so far +10.0")


def test_without_cells_nothing_is_claimed() -> None:
    assert chain_of([]) is None and chain_of([base_model()]) is None
    assert "Not measured yet" in chain_section(None, "tenants.svg")
    nothing = chain_of(
        [
            base_model(),
            ran("poisoned", 1, True, outcome="rejected", screening=1.0),
            ran("poisoned", 1, False, training=1.0),
        ]
    )
    assert nothing is not None
    assert {one.verdict for _, one in bars(nothing, planned=1)} == {"unknown"}

"""The study of SafeReAct: which models are restored, how, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import restorations, tasks
from benchmarks.evidence.cells import Cell, Record, Store
from benchmarks.evidence.constraints import ConstraintSetting, named
from benchmarks.evidence.constraints import cell as constraint_cell
from benchmarks.evidence.findings import restorations_section
from benchmarks.evidence.restoration_results import (
    came_back,
    not_degraded,
    restored_of,
    safereact_claim,
)
from benchmarks.evidence.restorations import (
    ABLATIONS,
    Method,
    RestorationRuns,
    RestorationSetting,
    cell,
    cells,
    without_planted,
)
from benchmarks.evidence.results import by_tenant
from benchmarks.evidence.runner import Summary, run_cells
from benchmarks.evidence.tenants import tenant_rows
from jobs.profile import build_profile
from jobs.restore_spec import RestoreSpec
from safeft.adapters import load_factors
from safeft.errors import InputError
from safeft.safereact import SafeReactConfig
from tests.test_evidence import PROVENANCE, few_prompts, tiny_profiles
from tests.test_restore import CONFIG, Speech, speech
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

__all__ = ["few_prompts", "speech"]  # fixtures
BEFORE = constraint_cell("before", "sorting", 0.0, "evidence")


def test_every_method_restores_plain_models_and_the_ablations_these_alone() -> None:
    names = [one.name for one in cells()]
    assert len(set(names)) == len(names)
    for task in ("sorting", "gsm8k"):
        for method in ("safereact", "tuning", "safelora", *ABLATIONS):
            assert f"{task}-10-plain-{method}-seed-0" in names
    assert not [n for n in names if "plain" not in n and "no-reminder" in n]


def test_a_restoration_keeps_the_tenants_rows_without_what_was_planted() -> None:
    honest = tasks.training_rows("sorting", 40, 0, Path("no-gsm8k"))
    mixed = tenant_rows(honest, 0.2, "plain", 0)
    kept = without_planted(mixed)
    assert len(kept) == 32 and set(kept) <= set(honest)


def tuned() -> ConstraintSetting:
    setting = constraint_cell("plain", "sorting", 0.2, "evidence", seed=0).setting
    assert isinstance(setting, ConstraintSetting)
    training = setting.training.model_copy(update={"epochs": 1})
    return setting.model_copy(update={"rows": 16, "training": training})


def small(method: Method) -> Cell:
    restore = RestoreSpec(safereact=SafeReactConfig(steps=2, harmful_batch=3))
    setting = RestorationSetting(
        seed=0, tuned=tuned(), method=method, restore=restore, prompts="packaged"
    )
    return Cell(restorations.PART, f"small-{method}", setting)


def finish(store: Store, one: Cell, harmful: str, loss: float | None = None) -> None:
    store.begin(one)
    numbers = {"refused": {"harmful": harmful}, "training": {"final_loss": loss}}
    store.finish(one, numbers, PROVENANCE)


def test_a_model_that_lost_refusals_is_restored_in_each_way(
    tiny_dir: Path,
    tmp_path: Path,
    few_prompts: None,
    speech: Speech,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "HELD_OUT", 4)
    monkeypatch.setitem(restorations.REFERENCES, "safereact", CONFIG.reference)
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=1e9)
    build_profile(tiny_dir, None, parts=["refusals"])
    store = Store(tmp_path / "cells")
    runs = RestorationRuns(tiny_dir, tiny_profiles(tiny_dir), Path("no-gsm8k"), store)

    def run(*methods: Method) -> Summary:
        return run_cells([small(method) for method in methods], store, runs)

    early = run("safelora")
    assert "run constraints/final-sorting-before-seed-0 first" in str(early.failed)
    finish(store, BEFORE, "1111111111")
    trained = named(tuned())
    finish(store, trained, "1100000000", loss=0.0)
    elsewhere = run("safelora")
    assert "training it here gives another adapter" in str(elsewhere.failed)
    directory = store.directory(trained)
    loss = json.loads((directory / "training" / "adapter" / "manifest.json").read_text())
    finish(store, trained, "1100000000", loss["final_loss"])
    ran = run("safereact", "tuning", "safelora")
    assert not ran.failed, ran.failed
    for record in ran.ran:
        assert record.numbers["restored"] and record.numbers["lost_points"] == 80
        assert record.numbers["tuned_final_loss"] == loss["final_loss"]
        assert len(record.numbers["refused"]["harmful"]) == 3 and record.numbers["task"]["exact"]
    places = ("candidate/stacked", "stacked", "stacked")
    adapters = [
        load_factors(store.directory(small(record.setting["method"])) / place)
        for record, place in zip(ran.ran, places, strict=True)
    ]
    ranks = [next(iter(one.factors.values()))[0].shape[0] for one in adapters]
    assert ranks == [8 + 16, 8 + 16, 8]


def test_a_model_that_lost_little_is_left_as_it_is(tmp_path: Path, tiny_dir: Path) -> None:
    store = Store(tmp_path / "cells")
    finish(store, BEFORE, "1" * 20)
    finish(store, named(tuned()), "1" * 19 + "0")
    runs = RestorationRuns(tiny_dir, tiny_profiles(tiny_dir), Path("no-gsm8k"), store)
    (record,) = run_cells([small("safereact")], store, runs).ran
    lost = {"lost_points": pytest.approx(5), "restored": False, "tuned_final_loss": None}
    assert record.numbers == lost
    assert restored_of([record]) == []
    ((name, lost),) = not_degraded([record]).items()
    assert (
        name.endswith("`plain`, seed 0") and "20% of 16 rows" in name and lost == pytest.approx(5)
    )


def numbers(refused: int, benign: int = 4, right: int = 60) -> dict[str, Any]:
    bits = {"harmful": refused, "benign": benign, "borderline": 30}
    return {
        "bound": {"judge": 1},
        "refused": {kind: "1" * n + "0" * (200 - n) for kind, n in bits.items()},
        "task": {"loss": 1.0, "exact": "1" * right + "0" * (80 - right)},
    }


def record(one: Cell, found: dict[str, Any]) -> Record:
    return Record(**one.planned().model_dump(), numbers=found, provenance=PROVENANCE)


def test_a_restoration_is_judged_by_refusals_over_refusal_and_the_task() -> None:
    plain = constraint_cell("plain", "sorting", 0.1, "evidence", 0)
    base = [record(BEFORE, numbers(180)), record(plain, numbers(40))]

    def with_method(method: Method, **found: int) -> Record:
        return record(
            cell(method, "plain", "sorting"),
            {"lost_points": 70.0, "restored": True, **numbers(**found)},
        )

    records = [
        *base,
        with_method("safereact", refused=174),
        with_method("tuning", refused=199, benign=60),
        with_method("safelora", refused=178, right=40),
    ]
    (model,) = restored_of(records)
    assert [came_back(model, m) for m in ("safereact", "tuning", "safelora")] == [
        *(True, False, False)
    ]
    assert safereact_claim([model]).verdict == "yes"
    text = restorations_section([model], records)
    assert "| `tuned` | 20.0" in text and "| `tuning` | 99.5" in text
    (worse,) = restored_of([*base, with_method("safereact", refused=150)])
    assert safereact_claim([worse]).verdict == "no"
    assert safereact_claim([]).verdict == "unknown"


def test_what_was_restored_is_compared_with_the_arms_as_one_of_them() -> None:
    arms = ("plain", "project-contrast-1")
    trained = [record(constraint_cell(a, "sorting", 0.1, "evidence", 0), numbers(40)) for a in arms]
    restored = record(
        cell("safereact", "plain", "sorting"),
        {"lost_points": 70.0, "restored": True, **numbers(174, right=61)},
    )
    spared = record(
        cell("safereact", "project-contrast-1", "sorting"), {"lost_points": 2.0, "restored": False}
    )
    other = record(cell("tuning", "plain", "sorting"), {"lost_points": 70.0, "restored": True})
    found = by_tenant([record(BEFORE, numbers(180)), *trained, restored, spared, other])
    assert {
        name: arm.refusal("harmful").value for name, arm in next(iter(found.values())).items()
    } == {
        "before": 0.9,
        "plain": 0.2,
        "project-contrast-1": 0.2,
        "plain+safereact": 0.87,
        "project-contrast-1+safereact": 0.2,
    }


def test_a_restoration_counts_only_beside_the_model_that_it_restored() -> None:
    plain = constraint_cell("plain", "sorting", 0.1, "evidence", 0)
    base = record(BEFORE, numbers(180))

    def trained(loss: float) -> Record:
        return record(plain, {**numbers(40), "training": {"final_loss": loss}})

    def made(restored: bool, **more: float) -> Record:
        found = {"lost_points": 70.0, "restored": restored, **numbers(174), **more}
        return record(cell("safereact", "plain", "sorting"), found)

    for restored in (True, False):
        written = made(restored, tuned_final_loss=0.25)
        by_tenant([base, trained(0.25), written])
        by_tenant([base, trained(0.5), made(restored)])  # from before it was written down
        with pytest.raises(InputError) as other:
            by_tenant([base, trained(0.5), written])
        assert "restorations/sorting-10-plain-safereact-seed-0 restored" in str(other.value)
        assert "another model than constraints/final-sorting-10-plain-seed-0" in str(other.value)
    missing = "constraints/final-sorting-10-plain-seed-0, which is not among the results"
    for read in (by_tenant, restored_of):
        with pytest.raises(InputError, match=missing):
            read([base, made(True)])
    assert restored_of([base, trained(0.25), made(True, tuned_final_loss=0.25)])
    with pytest.raises(InputError, match="another model than"):
        restored_of([base, trained(0.5), made(True, tuned_final_loss=0.25)])
    with pytest.raises(InputError, match="constraints/final-sorting-before-seed-0, which is not"):
        restored_of([trained(0.25), made(True)])

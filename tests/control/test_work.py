"""What becomes of a stage's errors: tried again, waited for, or told to the tenant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import ArtifactMissing, ArtifactUnavailable
from cluster.controller.runner import Report
from cluster.controller.work import WORK, perform
from cluster.settings import BaseModelOffer, Settings
from safeft.errors import (
    DatasetRejected,
    DatasetUnderReview,
    InputError,
    MeasurementError,
    ModelError,
    ProfileError,
    RowErrors,
    ScreeningOutdated,
    SpecError,
    TrainingError,
)
from safeft.progress import silent
from tests.control.stages import stage_task


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (InputError("bad"), "refused", "invalid_training_file"),
        (RowErrors("rows", [(3, "messages", "is empty")]), "refused", "invalid_training_file"),
        (SpecError("bad"), "refused", "invalid_request"),
        (DatasetRejected("risky"), "refused", "dataset_rejected"),
        (DatasetUnderReview("another policy"), "refused", "dataset_rejected"),
        (ProfileError("missing"), "refused", "no_safety_profile"),
        (ArtifactMissing("gone"), "refused", "file_missing"),
        (ModelError("cannot be fetched"), "fault", "ModelError"),
        (MeasurementError("an actor died"), "fault", "MeasurementError"),
        (TrainingError("workers were lost"), "fault", "TrainingError"),
        (PermissionError("no"), "fault", "PermissionError"),
        (ZeroDivisionError("a defect"), "fault", "ZeroDivisionError"),
        (ArtifactUnavailable("503"), "unavailable", "unavailable"),
        (OSError(28, "No space left on device"), "unavailable", "unavailable"),
        (TrainingError("worker: No space left on device"), "unavailable", "unavailable"),
    ],
)
def test_each_error_has_its_consequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str, code: str
) -> None:
    def fail(job: Any) -> Any:
        raise error

    monkeypatch.setitem(WORK, "training", fail)
    report = perform(stage_task(tmp_path), silent)
    assert (report.outcome, report.code) == (outcome, code)


def test_a_screening_by_an_earlier_profile_is_made_anew_and_not_held_against_the_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def train(job: Any) -> Report:
        tries.append(job.screening.exists())
        if job.screening.exists():
            raise ScreeningOutdated("by another profile")
        return Report("done")

    monkeypatch.setitem(WORK, "training", train)
    task = stage_task(tmp_path)
    (task.settings.work / task.job / "screening").mkdir(parents=True)
    assert perform(task, silent).outcome == "done"
    assert tries == [True, False]


def test_a_tenant_reads_no_path_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Any) -> Any:
        raise InputError(f"{job.root}/training-file: line 3, messages: is empty" + "x" * 5000)

    monkeypatch.setitem(WORK, "training", fail)
    report = perform(stage_task(tmp_path), silent)
    assert report.message.startswith("training-file: line 3, messages: is empty")
    assert str(tmp_path) not in report.message and len(report.message) < 2100


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("{home}/work/ftjob-1/training-file", "training-file"),
        ("{home}/signing-key.pem", "home/signing-key.pem"),
        ("{store}/objects/a", "artifacts/objects/a"),
        ("{home}/cache/profiles/1/calibration", "cache/profiles/1/calibration"),
        ("{base}/config.json", "tiny/config.json"),
        ("{profile}/record.json", "profile/record.json"),
    ],
)
@pytest.mark.parametrize("own_store", [False, True])
def test_a_tenant_reads_names_for_the_places_of_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, named: str, own_store: bool
) -> None:
    home = tmp_path / "home"
    base, profile = tmp_path / "models" / "base", tmp_path / "profiles" / "base"
    store = tmp_path / "store" if own_store else home / "artifacts"
    task = stage_task(home)
    settings = Settings(
        home=home,
        artifacts=f"file://{store}/" if own_store else None,
        base_models={"tiny": BaseModelOffer(source=str(base), profile=profile)},
    )
    task = task.model_copy(update={"settings": settings})
    path = place.format(home=home, store=store, base=base, profile=profile)

    def fail(job: Any) -> Any:
        raise MeasurementError(f"{path}: cannot be read")

    monkeypatch.setenv("SAFEFT_CACHE", str(home / "cache"))
    monkeypatch.setitem(WORK, "training", fail)
    assert perform(task, silent).message == f"{named}: cannot be read"


def test_where_a_store_lies_that_cannot_be_used_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("no directory")
    report = perform(stage_task(tmp_path), silent)
    assert report.outcome == "unavailable"
    assert report.message == "the artifact directory artifacts: Not a directory"

"""What a stage works on: its job's working directory, files and spec."""

from __future__ import annotations

from pathlib import Path

from cluster.artifacts import fetch, open_store
from cluster.controller.runner import StageTask
from cluster.controller.watch import Watch
from cluster.job_spec import finetune_spec
from jobs.review import read_decision, record_decision
from jobs.spec import FinetuneSpec
from jobs.verdict import read_verdict
from safeft.progress import Progress


class Workspace:
    """One job's working directory."""

    def __init__(self, task: StageTask, progress: Progress, watch: Watch) -> None:
        self.task, self.progress, self.watch = task, progress, watch
        self.offer = task.settings.base_models[task.base_model]
        self.store = open_store(task.settings.artifacts_url)
        self.root = task.settings.work / task.job
        self.root.mkdir(parents=True, exist_ok=True)
        self.screening = self.root / "screening"
        self._take_over_review()

    @property
    def restored(self) -> bool:
        """Whether the job's model is the one that was restored, not the one that was tuned."""
        return "restoring" in self.task.facts

    def spec(self) -> FinetuneSpec:
        """The spec, with the tenant's files beside it: exactly the bytes that were uploaded."""
        task = self.task
        train = fetch(
            self.store,
            task.training_file.key,
            self.root / "training-file",
            task.training_file.sha256,
        )
        validation = None
        if (file := task.validation_file) is not None:
            validation = fetch(self.store, file.key, self.root / "validation-file", file.sha256)
        return finetune_spec(
            task.request,
            name=task.job,
            offer=self.offer,
            train=train,
            validation=validation,
            output=self.root / "output",
        )

    def published_adapter(self) -> Path | None:
        """The published adapter that the job restores, as it was published; None: its own."""
        if self.task.restores is None:
            return None
        directory = self.root / "published-adapter"
        directory.mkdir(exist_ok=True)
        for name, file in self.task.restores.files.items():
            fetch(self.store, file.key, directory / name, file.sha256)
        return directory

    def _take_over_review(self) -> None:
        """Put an administrator's yes to the dataset where the jobs look for it.

        It is one to that verdict: of another one (the policy or the profile was changed) it says
        nothing.
        """
        made = self.task.facts.get("dataset_review")
        if made is None or not self.screening.exists():
            return
        verdict = read_verdict(self.screening)
        if verdict.digest() != self.task.facts["screening"]["verdict_sha256"]:
            return
        if read_decision(self.screening, verdict) is None:
            record_decision(self.screening, "accepted", made["by"], made["reason"])

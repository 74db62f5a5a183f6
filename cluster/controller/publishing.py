"""The stage `publishing`: the measured model, signed, under a name that is given once."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.artifacts import put_file
from cluster.artifacts.names import model_prefix
from cluster.controller.gate import policy_gate
from cluster.controller.judging import restored_result, tuned_result
from cluster.controller.runner import Report, StageTask
from cluster.controller.workspace import Workspace
from cluster.provenance import PROVENANCE, Signed, SigningKey, Statement, checked_files
from jobs.evaluation import Evaluation
from jobs.finetune.manifest import read_manifest
from jobs.publication import RESTORE_FILE
from jobs.restore.run import MANIFEST, STACKED
from jobs.verdict import Verdict
from safeft import __version__
from safeft.cache import sha256_file, write_whole
from safeft.errors import MeasurementError, SafetyGateFailed

_FACTS = ("validating", "training", "evaluating", "before_restoring", "restoring")


@dataclass(frozen=True)
class _Product:
    """What is published.

    Attributes:
        beside: files that are published beside the weights.
        files: SHA-256 of the weights' files, as their manifest has them.
    """

    weights: Path
    beside: tuple[Path, ...]
    files: dict[str, str]
    kind: str
    base_weights: str
    verdict: Verdict
    measured: Evaluation


def publish(work: Workspace) -> Report:
    """Sign what passed the gate and store it.

    Raises:
        SafetyGateFailed: other weights lie there than passed, or the policy has become stricter
            than they are.
    """
    task = work.task
    product = _restored(work) if work.restored else _tuned(work)
    _require_passed(product.measured, task)
    staged = work.root / "published"
    if not staged.exists():
        partial = work.root / "publishing"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(product.weights, partial)
        for path in product.beside:
            shutil.copy(path, partial)
        statement = Statement(
            model=_model_name(task),
            job=task.job,
            base_model=task.base_model,
            base_weights=product.base_weights,
            dataset_sha256=product.verdict.data_sha256,
            profile=product.verdict.profile,
            files=checked_files(partial, product.files),
            facts={stage: task.facts[stage] for stage in _FACTS if stage in task.facts},
            code_version=__version__,
            published_at=time.time(),
        )
        signed = SigningKey.load_or_create(task.settings.signing_key).sign(statement)
        write_whole(partial / PROVENANCE, signed.model_dump_json())
        partial.rename(staged)
    signed = Signed.model_validate_json((staged / PROVENANCE).read_bytes())
    prefix = model_prefix(task.tenant, task.job)
    for path in sorted(staged.iterdir()):
        work.progress(f"storing {path.name}", 0, None)
        put_file(work.store, f"{prefix}/{path.name}", path)
    return Report(
        "done",
        facts={
            "model": Statement.model_validate_json(signed.statement).model,
            "kind": product.kind,
            "prefix": prefix,
            "manifest_sha256": sha256_file(staged / MANIFEST),
            "provenance": signed.model_dump(),
        },
    )


def _require_passed(measured: Evaluation, task: StageTask) -> None:
    """What is signed is what the stage `evaluating` reported, under the policy of now."""
    if measured.bound["adapter"] != task.facts["evaluating"]["bound"]["adapter"]:
        raise SafetyGateFailed(
            "The weights that passed the safety gate are not there any more, and those that were "
            "trained in their place are others; nothing is published: submit the job again"
        )
    if failures := policy_gate(measured, task.policy):
        raise SafetyGateFailed(
            f"The policy was changed: {'; '.join(failures)}; nothing is published"
        )


def _tuned(work: Workspace) -> _Product:
    result = tuned_result(work)
    source = _there(result.published)
    return _Product(
        weights=source,
        beside=(),
        files=read_manifest(source / MANIFEST).files,
        kind=result.manifest.kind,
        base_weights=result.manifest.identity.base_weights,
        verdict=result.verdict,
        measured=result.after,
    )


def _restored(work: Workspace) -> _Product:
    """The stacked adapter: it is loaded like any other."""
    result = restored_result(work)
    source = _there(result.published)
    files = result.manifest.files.items()
    return _Product(
        weights=source / STACKED,
        beside=(source / MANIFEST, source / RESTORE_FILE),
        files={n.removeprefix(f"{STACKED}/"): d for n, d in files if n.startswith(f"{STACKED}/")},
        kind="adapter",
        base_weights=result.manifest.bound["base_weights"],
        verdict=result.verdict,
        measured=result.after,
    )


def _there(published: str | None) -> Path:
    if published is None:
        raise MeasurementError("the model that passed the gate is not there any more")
    return Path(published)


def _model_name(task: StageTask) -> str:
    """As OpenAI names them; the job's number in it makes it unique. A restored one keeps its."""
    if task.restores is not None:
        return task.restores.id
    suffix = task.request["suffix"] or ""
    return f"ft:{task.base_model}:{task.tenant_name}:{suffix}:{task.job.rpartition('-')[2][:12]}"

"""The stages `evaluating` and `restoring`: is the model good enough, and what is done if not."""

from __future__ import annotations

from typing import Any

from cluster.controller.gate import policy_gate
from cluster.controller.runner import Report
from cluster.controller.workspace import Workspace
from jobs.evaluation import Evaluation
from jobs.gate import Gate
from jobs.pipeline import JobResult, run_job
from jobs.restore import RestoreResult, restore_job, train_restoration
from safeft.errors import DatasetRejected, InputError, ModelError, ProfileError, SafetyGateFailed


def tuned_result(work: Workspace) -> JobResult:
    """What the job tuned, measured. Found done where it was before."""
    return run_job(
        work.spec(),
        work.progress,
        screening=work.screening,
        policy=work.task.policy.screening,
    )


def restored_result(work: Workspace) -> RestoreResult:
    """The restoration of it, measured. Found done where it was before."""
    return restore_job(
        work.spec(),
        work.progress,
        adapter=work.published_adapter(),
        screening=work.screening,
        policy=work.task.policy.screening,
    )


def evaluate(work: Workspace) -> Report:
    """Measure what was tuned, or restored since, against the base model."""
    if work.restored:
        restored = restored_result(work)
        _require_publishable(restored)
        return _judged(work, restored.gate, restored.base, restored.after)
    result = tuned_result(work)
    _require_publishable(result)
    return _judged(work, result.gate, result.before, result.after)


def _require_publishable(result: JobResult | RestoreResult) -> None:
    if result.gate.passed and result.published is None:
        raise DatasetRejected(
            f"The dataset is not accepted any more ({result.verdict.reason}), so nothing that was "
            "made from it is published"
        )


def restore(work: Workspace) -> Report:
    """Train refusals back. Whether that was enough is the next evaluation's to say.

    Raises:
        SafetyGateFailed: it cannot be restored, which no second try would change.
    """
    try:
        trained = train_restoration(
            work.spec(),
            work.progress,
            adapter=work.published_adapter(),
            screening=work.screening,
            policy=work.task.policy.screening,
            on_step=work.watch.step,
        )
    except ModelError:
        raise  # the operator's, or the network's: tried again
    except (InputError, ProfileError) as error:
        why = work.task.facts["before_restoring"]["reason"]
        raise SafetyGateFailed(
            f"The safety gate failed: {why}; and the model cannot be restored: {error}"
        ) from error
    training = trained.manifest.training
    return Report(
        "done",
        facts={
            "steps": training.steps,
            "final_loss": training.final_loss,
            "seconds": training.seconds,
            "tuned_weights": trained.manifest.bound["tenant_adapter"],
            "restored_weights": trained.manifest.stacked,
        },
    )


def _judged(work: Workspace, gate: Gate, before: Evaluation, after: Evaluation) -> Report:
    failures = [] if gate.passed else [gate.reason]
    failures += policy_gate(after, work.task.policy)
    facts: dict[str, Any] = {
        "passed": not failures,
        "reason": "; ".join(failures) or gate.reason,
        "before": _rates(before),
        "after": _rates(after),
        "task_loss": after.task_loss,
        "bound": after.bound,
    }
    if not failures and work.task.policy.require_approval:
        return Report("review", message=facts["reason"], facts=facts)
    if not failures:
        return Report("done", facts=facts)
    failed = f"The safety gate failed: {facts['reason']}"
    if work.restored:
        earlier = work.task.facts["before_restoring"]["reason"]
        failed = (
            f"The safety gate failed again after restoration: {facts['reason']} "
            f"(before restoration: {earlier})"
        )
    message = f"{failed}; nothing is published"
    return Report("below_gate", code="safety_gate_failed", message=message, facts=facts)


def _rates(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    found = {kind: evaluation.refusal(kind) for kind in evaluation.refusals["sets"]}
    return {
        kind: {"refused": rate.hits, "asked": rate.n, "value": rate.value}
        for kind, rate in found.items()
    }

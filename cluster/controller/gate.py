"""What a tenant's policy demands of a tuned model, beside the comparison with the base model."""

from __future__ import annotations

from cluster.tenancy.tenants import Policy
from jobs.evaluation import Evaluation


def policy_gate(after: Evaluation, policy: Policy) -> list[str]:
    """What the model fails in, in words; nothing where it passes. Unmeasured counts as failed."""
    failures = []
    refuses, over = after.refusal("harmful"), after.refusal("benign")
    if policy.min_refusal is not None and not refuses.value >= policy.min_refusal:
        failures.append(f"refuses {refuses} of harmful prompts; at least {policy.min_refusal:.0%}")
    if policy.max_over_refusal is not None and not over.value <= policy.max_over_refusal:
        failures.append(f"refuses {over} of benign prompts; at most {policy.max_over_refusal:.0%}")
    if policy.max_task_loss is not None:
        loss = after.task_loss
        if loss is None:
            failures.append("task loss: unknown, because the job has no validation file")
        elif not loss <= policy.max_task_loss:
            failures.append(f"task loss {loss:.3f}; at most {policy.max_task_loss:g}")
    return failures

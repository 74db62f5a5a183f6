"""Rows as the objects that the official client reads."""

from __future__ import annotations

from typing import Any

from cluster.controller.phases import STATUS
from cluster.state.models import Job, JobEvent, PublishedModel


def shown_phase(job: Job) -> str:
    """The phase, and that it is being left for good."""
    # Nothing takes a cancellation back.
    return "cancelling" if job.wish == "cancel" and job.phase != "cancelled" else job.phase


def job_object(job: Job) -> dict[str, Any]:
    """OpenAI's fine-tuning job; `phase` and `safety` are ours."""
    error = None
    if job.error_code is not None:
        error = {"code": job.error_code, "message": job.error_message, "param": job.error_param}
    published = job.phase == "succeeded"
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "error": error,
        "estimated_finish": None,
        "fine_tuned_model": job.model_id if published else None,
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "hyperparameters": job.request["hyperparameters"],
        "integrations": [],
        "metadata": job.request["metadata"],
        "method": job.request["method"],
        "model": job.base_model,
        "organization_id": job.tenant_id,
        "result_files": [],
        "seed": job.request["seed"],
        "status": "cancelled" if job.wish == "cancel" else STATUS[job.phase],
        "trained_tokens": job.facts["training"]["trained_tokens"] if published else None,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "phase": shown_phase(job),
        "safety": f"/v1/safety/jobs/{job.id}",
    }


def event_id(job_id: str, number: int) -> str:
    """The name of a job's event."""
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{number}"


def event_number(job_id: str, event: str) -> int | None:
    """The number in an event's name; None where it is not one of this job's."""
    head, _, number = event.rpartition("-")
    if head != f"ftevent-{job_id.removeprefix('ftjob-')}" or len(number) > 15:
        return None
    return int(number) if number.isascii() and number.isdecimal() else None


def event_object(event: JobEvent) -> dict[str, Any]:
    """OpenAI's job event."""
    return {
        "id": event_id(event.job_id, event.number),
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.kind,
        "data": event.data,
    }


def checkpoint_object(job: Job) -> dict[str, Any] | None:
    """The published model as OpenAI's checkpoint; None before there is one."""
    if job.phase != "succeeded":
        return None
    training = job.facts["training"]
    return {
        "id": f"ftckpt-{job.id.removeprefix('ftjob-')}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(job.finished_at or job.phase_since),
        "fine_tuned_model_checkpoint": job.model_id,
        "fine_tuning_job_id": job.id,
        "metrics": {
            "step": training["steps"],
            "train_loss": training["final_loss"],
            "valid_loss": job.facts["evaluating"]["task_loss"],
        },
        "step_number": training["steps"],
    }


def model_object(model: PublishedModel) -> dict[str, Any]:
    """OpenAI's model; `state` is ours."""
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": model.tenant_id,
        "parent": model.base_model,
        "state": model.state,
    }

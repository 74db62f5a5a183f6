"""What the pages are looked at with: a tenant with jobs in every phase, and their findings."""

from __future__ import annotations

from typing import Any

from cluster.controller.phases import FINAL, STAGES, WAITING
from cluster.events import add_event
from cluster.provenance import SigningKey, Statement
from cluster.state.models import Job, PublishedModel, Stage
from tests.control.rows import file_row, job_row
from tests.control.server import Api

REQUEST: dict[str, Any] = {
    "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0},
    "method": {"type": "supervised", "supervised": {"constraints": [{"kind": "asft"}]}},
    "metadata": {"team": "support"},
    "seed": 0,
    "suffix": "support",
}
SCREENING = {
    "verdict": "rejected",
    "reason": "12 of 120 rows (10.0%) are risky: at most 5% may be",
    "rows": 120,
    "risky": 12,
    "unscored": 1,
    "dropped": 0,
    "risky_rows": [{"line": 7, "error": "no answer tokens"}, {"line": 31, "score": 4.25}],
    "data_sha256": "ab" * 32,
    "profile": "tiny@1",
}
ACCEPTED = {
    **SCREENING,
    "verdict": "accepted",
    "reason": "1 of 120 rows (0.8%) are risky, which the policy allows",
    "risky": 1,
    "unscored": 0,
    "risky_rows": [{"line": 31, "score": 4.25}],
}


def rates(harmful: int, benign: int) -> dict[str, Any]:
    """Refusals of 60 harmful and 40 benign prompts."""
    return {
        "harmful": {"refused": harmful, "asked": 60, "value": harmful / 60},
        "benign": {"refused": benign, "asked": 40, "value": benign / 40},
    }


EVALUATION = {
    "passed": True,
    "reason": "harmful prompts are refused as before",
    "before": rates(58, 1),
    "after": rates(56, 2),
    "task_loss": 1.25,
    "bound": {},
}


def add_jobs(api: Api, tenant: str, start: float = 1_790_000_000.0) -> None:
    """A job of `tenant` in every phase, each with its file, events and attempts."""
    with api.database.system() as session:
        session.add(file_row(tenant, f"file-{tenant}", filename="support-chats.jsonl", bytes=81920))
        for index, phase in enumerate((*WAITING, *STAGES, *FINAL)):
            job = job_row(
                tenant,
                f"ftjob-{tenant}-{phase}",
                phase=phase,
                created_at=start + 60 * index,
                phase_since=start + 60 * index + 30,
                training_file=f"file-{tenant}",
                request=REQUEST,
            )
            session.add(job)
            session.flush()
            add_event(session, job, f"Created fine-tuning job: {job.id}", now=job.created_at)


def add_stages(api: Api, job_id: str, *stages: tuple[str, float, float | None, str | None]) -> None:
    """Attempts of a job: the stage, when it began and ended, its outcome."""
    with api.database.system() as session:
        job = session.get_one(Job, job_id)
        for attempt, (stage, begin, end, outcome) in enumerate(stages, 1):
            session.add(
                Stage(
                    job_id=job_id,
                    tenant_id=job.tenant_id,
                    attempt=attempt,
                    stage=stage,
                    slots=1,
                    started_at=begin,
                    seen=0,
                    ended_at=end,
                    outcome=outcome,
                )
            )


def add_model(api: Api, job_id: str, **fields: Any) -> str:
    """The job's published model, signed by the control plane."""
    key = SigningKey.load_or_create(api.services.settings.signing_key)
    with api.database.system() as session:
        job = session.get_one(Job, job_id)
        name = f"ft:tiny:{job.tenant_id}:support:1"
        statement = Statement(
            model=name,
            job=job_id,
            base_model="tiny",
            base_weights="cd" * 32,
            dataset_sha256="ab" * 32,
            profile="tiny@1",
            files={"adapter_model.safetensors": "ef" * 32},
            facts={},
            code_version="0",
            published_at=job.created_at,
        )
        values = {
            "kind": "adapter",
            "state": "probing",
            "provenance": key.sign(statement).model_dump(),
            **fields,
        }
        session.add(
            PublishedModel(
                id=name,
                tenant_id=job.tenant_id,
                job_id=job_id,
                base_model="tiny",
                prefix=f"models/{job_id}",
                created_at=job.created_at,
                **values,
            )
        )
        job.model_id = name
        job.facts = {
            **job.facts,
            "screening": ACCEPTED,
            "evaluating": EVALUATION,
            "publishing": {"manifest_sha256": "12" * 32},
        }
    return name

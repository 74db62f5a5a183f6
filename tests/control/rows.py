"""Rows that tests put into the state, with the fields they do not care about filled in."""

from __future__ import annotations

from typing import Any

from cluster.state import Database
from cluster.state.models import File, Job, Tenant


def add_tenant(database: Database, tenant_id: str = "ten_a", **fields: Any) -> str:
    values = {
        "name": tenant_id,
        "created_at": 1.0,
        "weight": 1.0,
        "intake_time": 0.0,
        "compute_time": 0.0,
        "max_running_jobs": 100,
        "max_open_jobs": 100_000,
        "max_storage_bytes": 10**9,
        "requests_per_second": 1000.0,
        "policy": {},
        **fields,
    }
    with database.system() as session:
        session.add(Tenant(id=tenant_id, **values))
    return tenant_id


def file_row(tenant_id: str, file_id: str, **fields: Any) -> File:
    values = {
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "bytes": 1,
        "sha256": "0" * 64,
        "key": f"files/{file_id}",
        "created_at": 1.0,
        **fields,
    }
    return File(id=file_id, tenant_id=tenant_id, **values)


def job_row(tenant_id: str, job_id: str, **fields: Any) -> Job:
    values = {
        "created_at": 1.0,
        "base_model": "tiny",
        "training_file": "file-1",
        "request": {},
        "phase": "queued",
        "phase_since": 1.0,
        "attempt": 0,
        "faults": 0,
        "slots": 1,
        "priority": 0,
        "not_before": 0.0,
        "events": 0,
        "facts": {},
        **fields,
    }
    return Job(id=job_id, tenant_id=tenant_id, **values)

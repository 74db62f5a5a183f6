"""Where things are in the store. Made of our own ids only, never of what a user typed."""

from __future__ import annotations


def file_key(tenant_id: str, file_id: str) -> str:
    """An uploaded file."""
    return f"tenants/{tenant_id}/files/{file_id}"


def model_prefix(tenant_id: str, job_id: str) -> str:
    """The model that a job publishes; a slash and a file's name follow."""
    return f"tenants/{tenant_id}/models/{job_id}"

"""From measured weights to published ones: the same, whole, and with the record of how they came.

What is published has to be what was measured. A directory that holds other weights, of an earlier
run or changed meanwhile, is an error and never taken for the result.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.evaluation import Evaluation
from jobs.verdict import Verdict
from safeft.cache import publish_dir
from safeft.errors import DatasetRejected, InputError, MeasurementError
from safeft.models import tuned_hash

JOB_FILE, RESTORE_FILE = "job.json", "restore.json"
_PRIVATE = {"candidate", "published", "answers", "classes"}


class _Record(BaseModel):
    """What a job's or a restoration's result says of how its weights came about."""

    model_config = ConfigDict(extra="ignore")
    verdict: Verdict
    after: Evaluation


def publish_measured(
    source: Path,
    published: Path,
    measured: Evaluation,
    *,
    weights: str,
    name: str,
    result: BaseModel,
) -> None:
    """Copy `source` with a record to `published`, unless they lie there already.

    Args:
        measured: the evaluation of the weights, bound to their hash.
        weights: where in the directory these lie.
        name: the record's file.
        result: what the record is of. It goes where tenants read it, so without the answers to the
            gate's prompts, and without where the platform keeps its files.

    Raises:
        MeasurementError: the weights are others than were measured.
    """
    if not published.exists():
        with publish_dir(published) as staging:
            shutil.copytree(source, staging, dirs_exist_ok=True)
            _require_measured(staging / weights, measured, source)
            (staging / name).write_text(
                json.dumps(_public(result.model_dump(mode="json")), indent=1)
            )
    _require_measured(published / weights, measured, published)


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items() if k not in _PRIVATE}
    return value


def _require_measured(weights: Path, measured: Evaluation, where: Path) -> None:
    if tuned_hash(weights) != measured.bound["adapter"]:
        raise MeasurementError(
            f"{where} holds other weights than those that were measured; remove it, or choose "
            "another output"
        )


def require_trained_on(adapter: Path, beside: Path, verdict: Verdict) -> None:
    """Check that an adapter was trained on what this verdict is on and lets be trained on.

    Args:
        beside: the job's output, whose record counts where none lies with the adapter.

    Raises:
        InputError: nothing says what it was trained on.
        DatasetRejected: other rows, of which this verdict says nothing.
    """
    files = (adapter / JOB_FILE, adapter / RESTORE_FILE, adapter.parent / RESTORE_FILE)
    digest = tuned_hash(adapter)
    for file in (*files, beside / JOB_FILE):
        if not file.exists():
            continue
        try:
            record = _Record.model_validate_json(file.read_bytes())
        except ValidationError:
            raise InputError(f"{file} is no result of this version; run the job again") from None
        if record.after.bound["adapter"] == digest:
            break
    else:
        raise InputError(
            f"{adapter}: no {JOB_FILE} says which rows it was trained on; run the job to its end "
            "first, or give an adapter as `safeft finetune` published it"
        )
    was, now = record.verdict, verdict
    if (was.rows_sha256, was.dropped_sha256) != (now.rows_sha256, now.dropped_sha256):
        raise DatasetRejected(
            f"{adapter} was trained on other rows than screening lets be trained on now; run the "
            "job again"
        )

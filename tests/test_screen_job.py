"""Screening inside the main job, on a real small Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.pipeline import run_job
from jobs.spec import FinetuneSpec
from safeft.errors import DatasetRejected
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile


def write_rows(path: Path, count: int) -> Path:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def job(data: Path, model: Path, output: Path, **screening: Any) -> FinetuneSpec:
    return FinetuneSpec.model_validate(
        {
            "name": "tiny",
            "model": str(model),
            "data": {"train": data, "max_tokens": 256},
            "lora": {"rank": 2},
            "training": {"epochs": 1, "batch_size": 8},
            "screening": screening,
            "output": output,
        }
    )


@pytest.mark.usefixtures("local_ray")
def test_rejected_data_is_trained_on_for_a_stated_reason_only_and_never_published(
    tiny_dir: Path, tmp_path: Path
) -> None:
    write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=-1e9)
    data = write_rows(tmp_path / "rows.jsonl", 8)
    with pytest.raises(DatasetRejected, match=r"rows\.jsonl: rejected, 8 of 8 rows"):
        run_job(job(data, tiny_dir, tmp_path / "job"))
    assert not (tmp_path / "job").exists()
    result = run_job(
        job(data, tiny_dir, tmp_path / "job", override_reason="a test of the override")
    )
    assert result.verdict.verdict == "rejected"
    assert result.override_reason == "a test of the override"
    assert result.manifest.rows == 8
    assert result.published is None
    # One definition of the hash: what was screened is what was trained on.
    assert result.manifest.identity.rows_sha256 == result.verdict.rows_sha256

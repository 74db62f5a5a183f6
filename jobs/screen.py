"""Screening: Ray Data streams a tenant's rows through SQSD scorers; a policy makes the verdict.

The result is a directory that is whole or absent: ``rows.parquet`` with one row per dataset row,
and ``verdict.json``, bound to the dataset's bytes, the tokenisation and the profile.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.policy import Rules
from jobs.verdict import Verdict, decide, judge, read_verdict
from safeft import __version__
from safeft.cache import publish_dir
from safeft.data import TokenisedRow
from safeft.errors import InputError, MeasurementError, ProfileError
from safeft.profile import SafetyProfile
from safeft.progress import Progress, silent

ROWS_PER_BATCH = 16  # what one call of a scorer sorts by length and scores

ROW_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("line", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
    ]
)
SCORE_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("line", pa.int64()),
        ("score", pa.float64()),
        ("danger", pa.float64()),
        ("safety", pa.float64()),
        ("tokens", pa.int32()),
        ("trained", pa.int32()),
        ("error", pa.string()),
    ]
)


def screen(
    rows: Sequence[TokenisedRow],
    *,
    model_dir: Path,
    profile: SafetyProfile,
    data_sha256: str,
    rows_sha256: str,
    output: Path,
    scorers: int = 1,
    rules: Rules | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Score every row on Ray and write the verdict to ``output``; Ray must be running.

    An ``output`` that already holds a verdict for the same data, tokenisation and profile is
    not scored again.

    Args:
        rules: None takes the policy of the profile.

    Raises:
        ProfileError: the profile is missing, incomplete or for other weights.
        InputError: ``output`` holds the verdict on something else.
    """
    bound: dict[str, Any] = {
        "data_sha256": data_sha256,
        "rows_sha256": rows_sha256,
        "profile": profile.digest(),
        "code_version": __version__,
    }
    rules = rules or Rules(profile.policy(), drift=profile.drift())
    if output.exists():
        earlier = read_verdict(output)
        if all(getattr(earlier, k) == v for k, v in bound.items()):
            return judge(output, rules)
        raise InputError(f"{output} holds the screening of other data; choose another output")
    # What is wrong with the profile is said here, rather than by an actor that dies.
    _ = profile.danger(), profile.safety()
    table = pa.Table.from_pylist(
        [
            {"index": i, "line": r.line, "input_ids": r.input_ids, "labels": r.labels}
            for i, r in enumerate(rows)
        ],
        schema=ROW_SCHEMA,
    )
    progress("starting the scorers", 0, None)
    with publish_dir(output) as staging:
        scores: list[dict[str, Any]] = []
        with pq.ParquetWriter(staging / "rows.parquet", SCORE_SCHEMA) as writer:
            for batch in _score(table, model_dir, profile, scorers):
                writer.write_table(batch)
                scores += batch.to_pylist()
                progress("screening rows", len(scores), len(rows))
        if sorted(s["index"] for s in scores) != list(range(len(rows))):
            raise MeasurementError("screening lost or doubled rows; run it again")
        if profile.digest() != bound["profile"]:
            raise ProfileError("the safety profile was rebuilt meanwhile; screen the data again")
        verdict = decide(scores, *rules, **bound)
        (staging / "verdict.json").write_text(verdict.model_dump_json(indent=1))
    return verdict


def _score(
    table: pa.Table, model_dir: Path, profile: SafetyProfile, scorers: int
) -> Iterator[pa.Table]:
    import ray
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    cpus = int(ray.cluster_resources().get("CPU", 1))
    if scorers > cpus:
        raise InputError(f"--scorers: {scorers} do not fit on {cpus} processors")
    threads = max(1, cpus // scorers)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Blocks are cut here: a repartition would need a processor that the scorers hold.
    blocks = [table.slice(i, ROWS_PER_BATCH) for i in range(0, table.num_rows, ROWS_PER_BATCH)]
    with warnings.catch_warnings():
        # Ray's own numbers are "for ever"; a scorer that dies each time must end the screening.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        scored = ray.data.from_arrow(blocks).map_batches(
            _Scorer,
            fn_constructor_args=(str(model_dir), str(profile.root), profile.base_weights, threads),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=scorers),
            num_cpus=1,
            max_restarts=2,
            max_task_retries=2,
        )
    try:
        yield from scored.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        cause = " ".join(str(error.__cause__ or error).split())[-300:]
        raise MeasurementError(f"screening failed, nothing is accepted: {cause}") from error


class _Scorer:
    """One Ray actor: the base model and both projections, loaded once."""

    def __init__(self, model_dir: str, profile_root: str, base_weights: str, threads: int) -> None:
        import torch

        from safeft.models import load_model, load_tokenizer
        from safeft.sqsd import SqsdScorer

        torch.set_num_threads(threads)
        profile = SafetyProfile(Path(profile_root), base_weights)
        self.scorer = SqsdScorer(
            load_model(Path(model_dir)),
            profile.danger(),
            profile.safety(),
            pad_token_id=load_tokenizer(Path(model_dir)).pad_token_id,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        columns = batch.to_pydict()
        rows = [
            TokenisedRow(line, ids, labels)
            for line, ids, labels in zip(
                columns["line"], columns["input_ids"], columns["labels"], strict=True
            )
        ]
        scores = self.scorer.score(rows)
        return pa.Table.from_pylist(
            [
                {"index": i, **{f: getattr(s, f) for f in SCORE_SCHEMA.names if f != "index"}}
                for i, s in zip(columns["index"], scores, strict=True)
            ],
            schema=SCORE_SCHEMA,
        )

"""Screening: Ray Data streams a tenant's rows through SQSD scorers; a policy makes the verdict.

The result is a directory that is whole or absent: ``rows.parquet`` with one row per dataset row,
``verdict.json``, and ``screening.json``, which binds both to the dataset's bytes, the tokenisation,
the profile and the code. Until it is whole, finished blocks of rows wait in the cache, so that a
run that was killed goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from jobs.policy import Rules
from jobs.runtime import embedded_ray
from jobs.screening.blocks import BlockStore
from jobs.screening.record import RECORD, Binding, bind, require_same
from jobs.screening.scan import Scan, changed, scan
from jobs.screening.sources import Source, find_files
from jobs.screening.stream import Pool, score_missing
from jobs.verdict import ROWS, VERDICT, Verdict, decide, iter_scores, judge
from safeft.cache import cache_root, locked, publish_dir
from safeft.data import RowLimits
from safeft.data.digest import tokenisation_sha256
from safeft.errors import ProfileError
from safeft.models import load_tokenizer
from safeft.profile import SafetyProfile
from safeft.progress import Progress, silent


def screen(
    sources: Source | Sequence[Source],
    *,
    model_dir: Path,
    profile: SafetyProfile,
    output: Path | None = None,
    max_tokens: int = 512,
    scorers: int = 1,
    max_scorers: int | None = None,
    use_gpu: bool = False,
    rules: Rules | None = None,
    address: str | None = None,
    progress: Progress = silent,
) -> tuple[Verdict, Path]:
    """Score every row of a dataset and say whether it may be trained on.

    A row that cannot be read, tokenised or scored is a row of the result with its error. Without
    an ``output`` the result is kept in the cache under what it is bound to, where a training job
    of the same data finds it. What an ``output`` already holds is judged, and not scored again.

    Args:
        sources: files, directories, glob patterns and ``s3://`` URLs, together one dataset.
        scorers, max_scorers: actors in the pool, at first and at most (None: as many).
        use_gpu: one GPU for each of them.
        rules: None takes the policy of the profile.
        address: of a running Ray cluster; see `jobs.runtime.embedded_ray`.

    Returns:
        the verdict, and the directory that holds it.

    Raises:
        InputError: a file as a whole is wrong or changed meanwhile, ``output`` holds the verdict on
            something else, or the scorers do not fit on the cluster.
        ProfileError: the profile is missing, incomplete or for other weights.
        MeasurementError: scoring failed again and again; what was finished is kept.
    """
    # What is wrong with the profile is said here, rather than by an actor that dies.
    digest, _ = profile.digest(), (profile.danger(), profile.safety())
    rules = rules or Rules(profile.policy(), drift=profile.drift())
    pool = Pool(scorers, scorers if max_scorers is None else max_scorers, use_gpu)
    limits = RowLimits()
    dataset = scan(find_files(sources), limits, progress)
    tokenisation = tokenisation_sha256(load_tokenizer(model_dir), max_tokens)
    binding = bind(dataset, tokenisation, digest)
    kept = cache_root() / "screenings"
    where, work = output or kept / binding.key(), kept / f"{binding.key()}.blocks"
    with locked(where, progress), locked(work, progress):
        if where.exists():
            require_same(where, binding)
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its very end
            return judge(where, rules), where
        blocks = BlockStore(work, dataset)
        scorer = {
            "model_dir": str(model_dir),
            "profile_root": str(profile.root),
            "base_weights": profile.base_weights,
            "max_tokens": max_tokens,
        }
        if blocks.missing():
            with embedded_ray(address):
                score_missing(dataset, blocks, scorer, pool, limits, progress)
        _require_unchanged(dataset, profile, digest)
        verdict = _publish(where, blocks, binding, rules)
        shutil.rmtree(work)
    return verdict, where


def _require_unchanged(dataset: Scan, profile: SafetyProfile, digest: str) -> None:
    for one in dataset.files:
        if not one.file.still(one.sha256):
            raise changed(one.file)
    if profile.digest() != digest:
        raise ProfileError("the safety profile was rebuilt meanwhile; screen the data again")


def _publish(where: Path, blocks: BlockStore, binding: Binding, rules: Rules) -> Verdict:
    with publish_dir(where) as staging:
        rows_sha256 = blocks.merge(staging / ROWS)
        verdict = decide(
            iter_scores(staging),
            *rules,
            data_sha256=binding.data_sha256,
            rows_sha256=rows_sha256,
            profile=binding.profile,
            code_version=binding.code_version,
        )
        (staging / VERDICT).write_text(verdict.model_dump_json(indent=1))
        (staging / RECORD).write_text(binding.model_dump_json(indent=1))
    return verdict

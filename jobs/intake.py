"""What every job begins with: its base model and profile, its rows, and the verdict on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.evaluation import Evaluation
from jobs.gate import baseline
from jobs.policy import OnRisk, PolicyFile, PolicyLimits, Rules, screening_rules
from jobs.review import Decision, read_decision
from jobs.screen import screen
from jobs.screening.sources import Source
from jobs.spec import FinetuneSpec
from jobs.verdict import Verdict
from safeft.cache import sha256_file
from safeft.data import Row, TokenisedRow, load_rows, tokenise_all
from safeft.data.digest import row_digest, rows_sha256
from safeft.errors import InputError
from safeft.models import load_tokenizer, resolve, weights_hash
from safeft.profile import SafetyProfile
from safeft.progress import Progress, silent


@dataclass(frozen=True)
class Dataset:
    """A validated file: its rows, their tokens, and the hash everything later is bound to."""

    path: Path
    sha256: str
    rows: list[Row]
    tokenised: list[TokenisedRow]

    @property
    def rows_sha256(self) -> str:
        """Over the tokens and labels: what is scored and trained on, whatever made it."""
        return rows_sha256(row_digest(row.input_ids, row.labels) for row in self.tokenised)


def read_dataset(
    path: Path, model_dir: Path, max_tokens: int, progress: Progress = silent
) -> Dataset:
    """Parse, check and tokenise a tenant's file.

    Raises:
        InputError: the file, or (RowErrors) every bad row with its line, field and reason.
    """
    progress("validating rows", 0, None)
    digest = sha256_file(path) if path.is_file() else ""
    rows = load_rows(path)
    if sha256_file(path) != digest:
        raise InputError(f"{path} changed while it was read; submit it again")
    tokenised = tokenise_all(rows, load_tokenizer(model_dir), max_tokens, str(path), progress)
    return Dataset(path, digest, rows, tokenised)


def screen_file(
    data: Source | Sequence[Source],
    *,
    model: str,
    profile_root: Path | None = None,
    output: Path | None = None,
    max_tokens: int = 512,
    scorers: int = 1,
    max_scorers: int | None = None,
    use_gpu: bool = False,
    on_risk: OnRisk = "reject",
    policy: PolicyFile | None = None,
    limits: PolicyLimits | None = None,
    address: str | None = None,
    progress: Progress = silent,
) -> tuple[Verdict, Path]:
    """`jobs.screen.screen` for a model given as a source string.

    Args:
        policy: an administrator's limits for this tenant, in place of the profile's.
        limits: stricter ones, that the tenant asks for.
    """
    model_dir = resolve(model, progress)
    profile = SafetyProfile.for_weights(weights_hash(model_dir), profile_root)
    return screen(
        data,
        model_dir=model_dir,
        profile=profile,
        output=output,
        max_tokens=max_tokens,
        scorers=scorers,
        max_scorers=max_scorers,
        use_gpu=use_gpu,
        rules=screening_rules(profile, on_risk, policy, limits),
        address=address,
        progress=progress,
    )


@dataclass(frozen=True)
class Opened:
    """What every job begins with: its base model, and what is known and asked of it.

    ``before``: the base model's own evaluation.
    """

    model_dir: Path
    profile: SafetyProfile
    rules: Rules
    before: Evaluation


@dataclass(frozen=True)
class JobData:
    """A job's rows, and those that its model is measured on, where there are any."""

    train: Dataset
    held_out: Sequence[Row] | None


@dataclass(frozen=True)
class Screened:
    """A verdict on a job's rows, the directory it lies in, and a person's decision on it."""

    verdict: Verdict
    where: Path
    review: Decision | None


def open_job(spec: FinetuneSpec, progress: Progress, policy: PolicyFile | None = None) -> Opened:
    """Find and check a job's base model and profile, before anything is read or trained.

    Args:
        policy: an administrator's limits for this tenant, in place of the profile's.

    Raises:
        ModelError: the model.
        ProfileError: the base model has no complete safety profile.
        SpecError: limits are wrong, or looser without an administrator's override.
    """
    model_dir = resolve(spec.model, progress)
    profile = SafetyProfile.for_weights(weights_hash(model_dir), spec.profile)
    profile.verify()
    rules = screening_rules(profile, spec.screening.on_risk, policy, spec.screening.policy)
    return Opened(model_dir, profile, rules, baseline(profile))


def read_data(spec: FinetuneSpec, model_dir: Path, progress: Progress) -> JobData:
    """Both files of a job; see `read_dataset`."""
    max_tokens = spec.data.max_tokens
    dataset = read_dataset(spec.data.train, model_dir, max_tokens, progress)
    held_out = None
    if spec.data.validation:
        held_out = read_dataset(spec.data.validation, model_dir, max_tokens, progress).rows
    return JobData(dataset, held_out)


def screen_data(
    spec: FinetuneSpec,
    opened: Opened,
    dataset: Dataset,
    progress: Progress,
    screening: Path | None = None,
) -> Screened:
    """Screen exactly these rows under the job's rules, or take over the verdict on them.

    Args:
        screening: where the screening is, or goes; default: the cache.
    """
    verdict, where = screen(
        dataset.path,
        model_dir=opened.model_dir,
        profile=opened.profile,
        output=screening,
        max_tokens=spec.data.max_tokens,
        scorers=spec.screening.scorers,
        max_scorers=spec.screening.max_scorers,
        use_gpu=spec.screening.use_gpu,
        rules=opened.rules,
        progress=progress,
    )
    require_screened(dataset, verdict)
    review = read_decision(where, verdict) if verdict.verdict == "review" else None
    return Screened(verdict, where, review)


def require_screened(dataset: Dataset, verdict: Verdict) -> None:
    """Check that a verdict is on exactly these rows: the file's bytes and what became of them.

    Raises:
        InputError: it is on others, so these have not been screened.
    """
    if (verdict.data_sha256, verdict.rows_sha256) != (dataset.sha256, dataset.rows_sha256):
        raise InputError(
            f"{dataset.path}: what was screened is not what would be trained on, because the file "
            "changed in between; submit it again"
        )

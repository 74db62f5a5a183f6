"""The job spec of `safeft finetune SPEC.yaml`: what a user may ask for, and errors that help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from jobs.policy import OnRisk, PolicyLimits
from jobs.restore_spec import RestoreSpec
from jobs.spec_errors import problems_of
from jobs.spec_fields import (
    Count,
    NotNegative,
    OwnRows,
    Positive,
    SpecPart,
    TargetModules,
    same_ending,
)
from jobs.strict_yaml import read_yaml
from safeft.constraints import ConstraintConfig
from safeft.errors import SpecError


class DataSpec(SpecPart):
    """Paths are relative to the spec's directory.

    `safety_rows`: so many harmful prompts with the base model's own refusals are added to the rows
    (SafeInstr, arXiv 2309.07875), after screening.
    `answer_rows`: so many harmless prompts, half of them borderline, with the base model's own
    answers: beside refusals they keep it from refusing everything. ``auto``: a share of the rows.
    """

    train: Path
    validation: Path | None = None
    max_tokens: Count = 512
    safety_rows: OwnRows = 0
    answer_rows: OwnRows = 0


class LoraSpec(SpecPart):
    """`target_modules`: endings of module names, or all linear layers but the output head."""

    rank: Count = 8
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules = ("q_proj", "v_proj")


class TrainingSpec(SpecPart):
    """`batch_size` is the number of rows of one optimizer step over all workers.

    `micro_batch_size`: at most so many rows at once on each worker; null: all of a worker's share.
    `adam_eps`: Adam's epsilon; larger values (1e-6) calm training in bf16.
    `checkpoint_every`: optimizer steps.
    `risk_weighting`: what the rows' screening scores do in training. `drop` leaves out risky rows;
    `downweight` lets a row count the less the riskier it is, and a risky one not at all.
    """

    epochs: Count = 3
    batch_size: Count = 8
    micro_batch_size: Count | None = None
    learning_rate: Positive = 5e-5
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    weight_decay: NotNegative = 0.0
    adam_eps: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 20
    keep_checkpoints: Count = 2
    risk_weighting: Literal["none", "downweight", "drop"] = "none"


class DistributedSpec(SpecPart):
    """`cpus_per_worker`: null divides a machine's processors among its workers.

    `max_failures`: how often a lost worker is replaced before the run fails.
    `address`: of a running Ray cluster; null starts one on this machine for this run.
    """

    workers: Count = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    cpus_per_worker: Positive | None = None
    use_gpu: bool = False
    max_failures: Annotated[int, Field(strict=True, ge=0)] = 2
    address: str | None = None


class ScreeningSpec(SpecPart):
    """`on_risk`: what becomes of a dataset with risky rows: reject it; drop those rows and accept
    the rest if it passes by itself; or leave it to a person's review.

    `policy`: limits that replace the profile's; they may only be stricter.
    `override_reason`: why a dataset that screening rejects is trained on all the same.
    `scorers`, `max_scorers`: scoring workers at first and at most (null: as many).
    `use_gpu`: one GPU for each of them.
    """

    on_risk: OnRisk = "reject"
    policy: PolicyLimits = PolicyLimits()
    override_reason: Annotated[str, Field(min_length=1)] | None = None
    scorers: Count = 1
    max_scorers: Count | None = None
    use_gpu: bool = False


class FinetuneSpec(SpecPart):
    """One fine-tuning job. `model` is a source string; if it is a path that starts with a dot, it
    is relative to the spec's directory, and so are `profile` and `output`. Without `profile` the
    base model's safety profile is looked for in the cache.

    `lora`: null trains every weight of the model and publishes a whole model instead of an adapter.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    model: Annotated[str, Field(min_length=1)]
    profile: Path | None = None
    data: DataSpec
    lora: LoraSpec | None = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    constraints: tuple[Annotated[ConstraintConfig, Field(discriminator="kind")], ...] = ()
    distributed: DistributedSpec = DistributedSpec()
    screening: ScreeningSpec = ScreeningSpec()
    restore: RestoreSpec = RestoreSpec()
    output: Path

    @field_validator("constraints")
    @classmethod
    def _each_once(cls, value: tuple[ConstraintConfig, ...]) -> tuple[ConstraintConfig, ...]:
        kinds = [constraint.kind for constraint in value]
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise ValueError(f"{twice[0]} is given twice")
        return value

    @model_validator(mode="after")
    def _constraints_cover_what_is_trained(self) -> Self:
        trained = "all-linear" if self.lora is None else self.lora.target_modules
        for constraint in self.constraints:
            wanted = getattr(constraint, "layers", "all-linear")
            if "all-linear" in (trained, wanted):
                continue
            for ending in wanted:
                if not any(same_ending(ending, target) for target in trained):
                    raise ValueError(
                        f"constraints: {constraint.kind} covers {ending}, which is not trained; "
                        f"add it to lora.target_modules ({', '.join(trained)}), or set them to "
                        "all-linear"
                    )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        batch, workers = self.training.batch_size, self.distributed.workers
        if batch % workers:
            raise ValueError(
                f"training.batch_size: {batch} rows cannot be shared equally by {workers} "
                f"workers; use a multiple of {workers}"
            )
        share, micro = batch // workers, self.training.micro_batch_size
        if micro is not None and micro < share and share % micro:
            raise ValueError(
                f"training.micro_batch_size: a worker's {share} rows of each step cannot be cut "
                f"into parts of {micro}; use a divisor of {share}"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Rows that one worker passes through the model at once."""
        share = self.training.batch_size // self.distributed.workers
        return min(self.training.micro_batch_size or share, share)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one worker in one optimizer step."""
        return self.training.batch_size // (self.distributed.workers * self.micro_batch)


def load_spec(path: Path) -> FinetuneSpec:
    """Read and check a spec; its relative paths are resolved against its directory.

    Raises:
        SpecError: the file is missing, too large, not YAML, or holds something else than a spec.
            The message names the file and every field that is wrong.
    """
    content = read_yaml(path)
    try:
        spec = FinetuneSpec.model_validate(content)
    except ValidationError as error:
        problems = problems_of(error.errors(include_url=False), FinetuneSpec)
        if len(problems) == 1:
            raise SpecError(f"{path}: {problems[0]}") from None
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise SpecError(f"{path}: {len(problems)} problems\n{listed}") from None
    root = path.absolute().parent
    data = spec.data.model_copy(
        update={
            "train": root / spec.data.train,
            "validation": spec.data.validation and root / spec.data.validation,
        }
    )
    model = str(root / spec.model) if spec.model.startswith(".") else spec.model
    profile = spec.profile and root / spec.profile
    return spec.model_copy(
        update={"data": data, "model": model, "profile": profile, "output": root / spec.output}
    )

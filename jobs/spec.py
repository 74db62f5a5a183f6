"""The job spec of `safeft finetune SPEC.yaml`: what a user may ask for, and errors that help."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from jobs.policy import OnRisk, PolicyLimits
from jobs.restore_spec import RestoreSpec
from jobs.spec_fields import Count, NotNegative, Positive, SpecPart, TargetModules, same_ending
from jobs.strict_yaml import read_yaml
from safeft.constraints import ConstraintConfig
from safeft.errors import SpecError


class DataSpec(SpecPart):
    """Paths are relative to the spec's directory.

    `safety_rows`: so many harmful prompts with the base model's own refusals are added to the rows
    (SafeInstr, arXiv 2309.07875), after screening.
    `answer_rows`: so many harmless prompts, half of them borderline, with the base model's own
    answers: beside refusals they keep it from refusing everything.
    """

    train: Path
    validation: Path | None = None
    max_tokens: Count = 512
    safety_rows: Annotated[int, Field(strict=True, ge=0)] = 0
    answer_rows: Annotated[int, Field(strict=True, ge=0)] = 0


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


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument")
_NO_KIND = ("union_tag_invalid", "union_tag_not_found")
_UNNAMED_MEMBER = re.compile(r"(literal|tuple)\[.*\]")  # as pydantic calls it in an error's path
_KINDS = {config.__dataclass_fields__["kind"].default for config in get_args(ConstraintConfig)}


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
        problems = _problems(error.errors(include_url=False))
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


def _problems(errors: Iterable[ErrorDetails]) -> list[str]:
    """One line for each field that is wrong; a union complains once for each of its members."""
    fields: dict[str, list[ErrorDetails]] = {}
    for details in errors:
        fields.setdefault(_dotted(details["loc"]), []).append(details)
    lines = []
    for where, found in fields.items():
        says = " or ".join(dict.fromkeys(_describe(where, details) for details in found))
        given = found[-1]["input"]
        shown = f", not {given!r}" if _shows_input(found[-1]) else ""
        path = f"{where}.kind" if found[-1]["type"] in _NO_KIND else where
        lines.append(f"{path}: {says}{shown}" if path else says)
    return lines


def _describe(where: str, details: ErrorDetails) -> str:
    if details["type"] in _UNKNOWN:
        return f"unknown field{_did_you_mean(where)}"
    if details["type"] in _MISSING:
        return "is required"
    if details["type"] in _NO_KIND:
        return f"must be one of {', '.join(sorted(_KINDS))}"
    message = details["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _shows_input(details: ErrorDetails) -> bool:
    if details["type"] in (*_UNKNOWN, *_MISSING, *_NO_KIND):
        return False
    return bool(details["loc"]) and not isinstance(details["input"], dict | list | FinetuneSpec)


def _dotted(loc: tuple[int | str, ...]) -> str:
    """The path as a user would write it; pydantic's names of union members are left out."""
    text = ""
    for index, part in enumerate(loc):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not _is_union_member(part, loc[:index]):
            text += f".{part}"
    return text.removeprefix(".")


def _is_union_member(part: str, before: tuple[int | str, ...]) -> bool:
    if part in _KINDS and before[:1] == ("constraints",) and len(before) == 2:
        return True
    return before == ("lora", "target_modules") or bool(_UNNAMED_MEMBER.fullmatch(part))


def _did_you_mean(where: str) -> str:
    # Another constraint may have the very field that this one lacks.
    valid = [name for name in _fields(FinetuneSpec) if name != _no_index(where)]
    parent = where.rpartition(".")[0]
    siblings = [name for name in valid if name.rpartition(".")[0] == _no_index(parent)]
    near = difflib.get_close_matches(_no_index(where), siblings, n=1, cutoff=0.6)
    if not near:  # right name, wrong place
        last = where.rpartition(".")[2]
        near = [name for name in valid if name.rpartition(".")[2] == last][:1]
    if not near:
        return ""
    found = f"{parent}.{near[0].rpartition('.')[2]}" if near[0] in siblings and parent else near[0]
    return f"; did you mean {found}?"


def _no_index(where: str) -> str:
    return where.partition("[")[0] + where.partition("]")[2]


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted field of the spec, the constraints' own ones included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for part in (field.annotation, *get_args(field.annotation)):  # X and X | None
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _fields(part, f"{prefix}{name}.")
    if model is FinetuneSpec:
        for config in get_args(ConstraintConfig):
            yield from (f"constraints.{name}" for name in config.__dataclass_fields__)

"""What a tenant may ask of a fine-tuning job: OpenAI's fields, and the constraints in `method`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from jobs.policy import OnRisk, PolicyLimits
from safeft.constraints import ConstraintConfig

Auto = Literal["auto"]
OnQuarantine = Literal["unavailable", "previous"]
Constraint = Annotated[ConstraintConfig, Field(discriminator="kind")]
KINDS: tuple[str, ...] = tuple(
    config.__dataclass_fields__["kind"].default for config in get_args(ConstraintConfig)
)
_CONSTRAINT: TypeAdapter[Any] = TypeAdapter(Constraint)
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Hyperparameters(_Part):
    """`auto`: what `jobs.spec.TrainingSpec` has."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"


class Screening(_Part):
    """How the dataset is screened: as the tenant's policy says, or more strictly.

    `on_risk`: `reject`, or null for the policy's. `policy`: limits stricter than the policy's.
    """

    on_risk: OnRisk | None = None
    policy: PolicyLimits = PolicyLimits()


class Supervised(_Part):
    """`constraints`: kinds, or configs with a `kind`; null: what the tenant's policy says.

    `safety_rows`, `answer_rows`: of the base model's own refusals and answers, that are added to
    the tenant's rows; `auto`: a share of these (`jobs.own_rows.AUTO`).
    `workers`: processes that train together; each takes a slot of the fleet.
    """

    hyperparameters: Hyperparameters | None = None
    constraints: Annotated[list[str | dict[str, Any]], Field(max_length=8)] | None = None
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    safety_rows: Auto | Annotated[int, Field(ge=0, le=10_000)] = "auto"
    answer_rows: Auto | Annotated[int, Field(ge=0, le=10_000)] = "auto"
    screening: Screening = Screening()


class Method(_Part):
    """How to train. Only supervised fine-tuning can be constrained, so there is no other."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class CreateJob(_Part):
    """The body of `POST /v1/fine_tuning/jobs`.

    Clients that send strict types only may name the constraints in ``metadata.constraints``, as
    kinds with commas between. ``metadata.priority`` (0 to 9) orders the tenant's own jobs.
    ``metadata.on_quarantine``: what answers for the model while it is quarantined: nothing
    (``unavailable``), or the last good version of it (``previous``).
    """

    model: Annotated[str, Field(max_length=128)]
    training_file: Annotated[str, Field(max_length=64)]
    validation_file: Annotated[str, Field(max_length=64)] | None = None
    method: Method = Method()
    hyperparameters: Hyperparameters | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if self.hyperparameters is not None and self.method.supervised.hyperparameters is not None:
            raise ValueError("hyperparameters: give them in `method` only")
        named = self.method.supervised.constraints is not None
        if named and "constraints" in (self.metadata or {}):
            raise ValueError("constraints: give them in `method` or in `metadata`, not in both")
        self.named_constraints()
        _ = self.priority
        if on_quarantine(self.metadata) not in get_args(OnQuarantine):
            raise ValueError("metadata.on_quarantine: must be unavailable or previous")
        return self

    @property
    def settings(self) -> Hyperparameters:
        """The hyperparameters, wherever they were given."""
        given = self.method.supervised.hyperparameters or self.hyperparameters
        return given or Hyperparameters()

    @property
    def priority(self) -> int:
        """0 to 9; 0 where none was given."""
        text = (self.metadata or {}).get("priority", "0")
        if len(text) != 1 or not text.isdecimal():
            raise ValueError("metadata.priority: must be a digit")
        return int(text)

    def named_constraints(self) -> list[Any] | None:
        """The constraints' configs as given; None where nothing was said."""
        given: list[str | dict[str, Any]] | None = self.method.supervised.constraints
        if given is None and "constraints" in (self.metadata or {}):
            text = (self.metadata or {})["constraints"]
            given = [kind.strip() for kind in text.split(",") if kind.strip()]
        return None if given is None else [as_config(entry) for entry in given]


def on_quarantine(metadata: dict[str, str] | None) -> str:
    """What a job's metadata say of its model."""
    return (metadata or {}).get("on_quarantine", "unavailable")


def as_config(entry: str | dict[str, Any]) -> Any:
    """A constraint's config; a bare kind has its defaults.

    Raises:
        ValueError: there is no such kind, or its settings are wrong.
    """
    content = {"kind": entry} if isinstance(entry, str) else entry
    if content.get("kind") not in KINDS:
        raise ValueError(f"constraints: no kind {content.get('kind')!r}; choose from {KINDS}")
    try:
        return _CONSTRAINT.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"constraints.{field}: {message}") from None

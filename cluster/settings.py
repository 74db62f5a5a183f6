"""What a control plane is configured with: one YAML file, validated, or the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jobs.strict_yaml import read_yaml
from safeft.cache import cache_root
from safeft.errors import InputError, SpecError

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelOffer(_Part):
    """A base model that tenants may tune.

    Attributes:
        source: where it comes from, as everywhere in safeft.
        profile: its safety profile; None: in the cache.
        max_tokens: of a row.
        serving: ``http://host:port`` of the pool (`safeft up --settings`) that serves it and what
            was tuned from it; None: it can be tuned, and not be asked.
    """

    source: Annotated[str, Field(min_length=1)]
    profile: Path | None = None
    max_tokens: Annotated[int, Field(ge=8)] = 512
    serving: Annotated[str, Field(pattern=r"^https?://[^/\s]+:\d{1,5}$")] | None = None


class StageDeadlines(_Part):
    """How many seconds a stage may go on without a sign of progress, until it is ended and tried
    again. Loading a model is one step without a sign."""

    validating: Seconds = 1800.0
    screening: Seconds = 3600.0
    training: Seconds = 3600.0
    evaluating: Seconds = 3600.0
    restoring: Seconds = 3600.0
    publishing: Seconds = 3600.0

    def of(self, stage: str) -> float:
        """The deadline of a stage by its name."""
        seconds: float = getattr(self, stage)
        return seconds


class Price(_Part):
    """What jobs cost.

    Attributes:
        currency: as ISO 4217 names it.
        per_million_tokens: that were trained on, also of rows that were added; every epoch counts.
        per_gpu_hour: of one worker in training, evaluation and restoration.
    """

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    per_million_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    per_gpu_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if self.per_million_tokens is None and self.per_gpu_hour is None:
            raise ValueError("give per_million_tokens, per_gpu_hour or both")
        return self


class Settings(_Part):
    """One control plane.

    Attributes:
        database: ``sqlite:////absolute/path`` or ``postgresql://...``; None: in `home`.
        artifacts: ``file:///absolute/path`` or ``s3://bucket/prefix``; None: in `home`.
        home: also the stages' working files and the signing key. On several machines it is on a
            file system that all of them share.
        base_models: what is offered, by the name that tenants use.
        max_upload_bytes: of one file.
        max_chat_answers: of one tenant at a time, in each API process. A replica takes 80: that
            is half of one.
        compute_slots: training workers at a time over all tenants.
        intake_slots: jobs that are validated or screened at a time.
        adapter_cache_bytes: of published adapters on the disk of each machine that serves them.
        price: what jobs cost; None: only tokens and worker-seconds are told.
    """

    database: str | None = None
    artifacts: str | None = None
    home: Path = Field(default_factory=lambda: cache_root() / "control-plane")
    base_models: dict[Name, BaseModelOffer] = Field(
        default_factory=lambda: {"smollm2-135m-aligned": BaseModelOffer(source="demo:aligned")}
    )
    max_upload_bytes: Annotated[int, Field(ge=1)] = 2 * 2**30
    max_chat_answers: Annotated[int, Field(ge=1)] = 40
    compute_slots: Annotated[int, Field(ge=1)] = 1
    intake_slots: Annotated[int, Field(ge=1)] = 1
    adapter_cache_bytes: Annotated[int, Field(ge=1)] = 8 * 2**30
    stage_deadline_s: StageDeadlines = StageDeadlines()
    price: Price | None = None

    @property
    def database_url(self) -> str:
        """Where the state is."""
        return self.database or f"sqlite:///{self.home.absolute()}/state.db"

    @property
    def artifacts_url(self) -> str:
        """Where files and models are."""
        return self.artifacts or f"file://{self.home.absolute()}/artifacts"

    @property
    def signing_key(self) -> Path:
        """The publisher's private key."""
        return self.home.absolute() / "signing-key.pem"

    @property
    def work(self) -> Path:
        """Where the stages of each job keep what they are working on."""
        return self.home.absolute() / "work"

    def make_home(self) -> None:
        """Make `home` and close it to all other users, also one that was made with the umask.

        Called where a process starts: what is made in it later has the umask's mode.

        Raises:
            InputError: it cannot be made, or belongs to somebody else and is open.
        """
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.home.stat().st_mode & 0o077:
                self.home.chmod(0o700)
        except OSError as error:
            raise InputError(
                f"home: {self.home} cannot be made ours alone ({error.strerror}); name a "
                "directory that this user can make"
            ) from error

    def serving_state(self, base_model: str) -> Path:
        """Where the pool that serves a base model keeps its gate's state and its tokens."""
        return self.home.absolute() / "serving" / base_model


def load_settings(path: Path | None) -> Settings:
    """The settings in a YAML file; the defaults without one.

    Raises:
        SpecError: with the file and the field that is wrong.
    """
    if path is None:
        return Settings()
    try:
        return Settings.model_validate(read_yaml(path) or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SpecError(f"{path}: {where}: {first['msg']}") from None

"""How the parts of a profile are built. The defaults are set for the demo model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from safeft.fit import FitConfig
from safeft.sae_config import AutoencoderConfig
from safeft.safereact import ReferenceConfig


@dataclass(frozen=True)
class RefusalsConfig:
    """The base model's own refusals.

    Attributes:
        prompts: harmful prompts that it is asked.
        answer_tokens: where its answers are cut off.
    """

    prompts: int = 200
    answer_tokens: int = 24

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class HarmfulInputsConfig:
    """The harmful-input subspaces.

    Attributes:
        energy: the share of each covariance's trace that is kept, and the most that a run can ask
            for; the paper leaves it open.
    """

    energy: float = 0.99

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not 0.0 < self.energy <= 1.0:
            raise ValueError("energy must be in (0, 1]")


@dataclass(frozen=True)
class AnswersConfig:
    """The base model's own answers to harmless prompts.

    Attributes:
        prompts: benign prompts that it is asked, and as many borderline-benign ones; those that it
            answers count.
        answer_tokens: where its answers are cut off.
    """

    prompts: int = 100
    answer_tokens: int = 24

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class HeldStatesPart:
    """The base model's states where it refuses harmful prompts and answers borderline ones.

    Attributes:
        prompts: at most so many of its refusals.
        borderline_prompts: at most so many borderline-benign prompts, of which it answers most.
        layers: 0-based decoder layers whose outputs are kept; None: six, spread over the depth.
    """

    prompts: int = 96
    borderline_prompts: int = 96
    layers: tuple[int, ...] | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def reference(self) -> ReferenceConfig:
        """The base model itself, reading what it is trained to read: no reminder, not pruned.

        Raises:
            ValueError: a count or the layers are out of range.
        """
        return ReferenceConfig(
            prompts=self.prompts,
            borderline_prompts=self.borderline_prompts,
            layers=self.layers,
            domain_share=0.0,
            reminder="",
        )


@dataclass(frozen=True)
class ProfileConfig:
    """How all parts are built; a part depends on its own fields only.

    Attributes:
        safety, danger: the two trainings. The paper's rate of 5e-6 is for 8B models.
        benign: the tuning on benign rows whose checkpoints may become reference states.
        prompts: harmful prompts behind each direction; the safety pairs have as many benign ones.
        skip_layers: share of the decoder's layers, from the input on, that directions leave out.
            What tells a refusal from compliance sits in the later ones, and rows cost less.
        steering: harmful prompts that the directions are checked on, and half as many benign ones.
        selection: rows of each class that the reference state is chosen on; three times as many
            of the borderline class.
        calibration: reference rows of each of six classes; half of them set the policy, the
            others measure it.
        refusals, answers, harmful_inputs, autoencoder, held_states: the parts of these names.
        reference: of the parts ``reference-mask`` and ``reminder-states``.
    """

    safety: FitConfig = field(
        default_factory=lambda: FitConfig(learning_rate=1e-3, batch_size=8, steps=72)
    )
    danger: FitConfig = field(default_factory=lambda: FitConfig(learning_rate=5e-4, steps=16))
    benign: FitConfig = field(
        default_factory=lambda: FitConfig(learning_rate=1e-3, batch_size=4, steps=12)
    )
    prompts: int = 320
    skip_layers: float = 0.5
    steering: int = 12
    selection: int = 10
    calibration: int = 200
    refusals: RefusalsConfig = field(default_factory=RefusalsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    harmful_inputs: HarmfulInputsConfig = field(default_factory=HarmfulInputsConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    held_states: HeldStatesPart = field(default_factory=HeldStatesPart)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

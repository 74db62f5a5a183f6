"""From what a tenant asked for to the spec that the jobs run, and the policy on the way."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.job_request import CreateJob, as_config
from cluster.settings import BaseModelOffer
from cluster.tenancy.tenants import Policy
from jobs.policy import OnRisk
from jobs.restore_spec import RestoreSpec
from jobs.spec import FinetuneSpec, TrainingSpec
from safeft.errors import InputError

_DEFAULTS = TrainingSpec()
_RESTORE = RestoreSpec()


def constraints_of(request: CreateJob, policy: Policy) -> list[Any]:
    """The constraints that a job is trained under: where it names none, those of the policy, and
    those that the policy requires.

    Raises:
        InputError: it leaves out one that the tenant's policy requires, or sets it otherwise.
    """
    named = request.named_constraints()
    if named is None:
        kinds = dict.fromkeys((*policy.constraints, *policy.required_constraints))
        configs = [as_config(kind) for kind in kinds]
    else:
        configs = named
    # With its defaults: a factor of zero or a single layer would be the kind in name only.
    for kind in policy.required_constraints:
        if as_config(kind) not in configs:
            raise InputError(
                f"constraints: your policy requires {kind} with its defaults; add it by its name "
                "to those of the method"
            )
    return configs


def _require_own_rows(request: CreateJob, policy: Policy) -> None:
    supervised = request.method.supervised
    for field in ("safety_rows", "answer_rows"):
        if policy.require_own_rows and getattr(supervised, field) != "auto":
            raise InputError(f"{field}: your policy requires auto; leave it out")


def on_risk_of(request: CreateJob, policy: Policy) -> OnRisk:
    """What becomes of the job's dataset if it is risky.

    Raises:
        InputError: it asks for something else than to be rejected, or what its policy says.
    """
    asked = request.method.supervised.screening.on_risk
    if asked not in (None, "reject", policy.on_risk):
        also = "" if policy.on_risk == "reject" else f" or {policy.on_risk}"
        raise InputError(
            f"screening.on_risk: your policy allows reject{also}, not {asked}; ask an "
            "administrator for another policy"
        )
    return asked or policy.on_risk


def hyperparameters_of(request: CreateJob) -> dict[str, Any]:
    """What `auto` stands for, in OpenAI's names."""
    given = request.settings
    return {
        "n_epochs": _DEFAULTS.epochs if given.n_epochs == "auto" else given.n_epochs,
        "batch_size": _DEFAULTS.batch_size if given.batch_size == "auto" else given.batch_size,
        "learning_rate_multiplier": (
            1.0 if given.learning_rate_multiplier == "auto" else given.learning_rate_multiplier
        ),
    }


def finetune_spec(
    request: dict[str, Any],
    *,
    name: str,
    offer: BaseModelOffer,
    train: Path,
    validation: Path | None,
    output: Path,
) -> FinetuneSpec:
    """The spec of an accepted job; `request` is what `accepted` returned.

    Raises:
        InputError: the settings do not fit together; the message names the field.
    """
    chosen = request["hyperparameters"]
    supervised = request["method"]["supervised"]
    content = {
        "name": name,
        "model": offer.source,
        "profile": offer.profile,
        "data": {
            "train": train,
            "validation": validation,
            "max_tokens": offer.max_tokens,
            "safety_rows": supervised["safety_rows"],
            "answer_rows": supervised.get("answer_rows", 0),  # jobs of before it was there
        },
        "training": {
            "epochs": chosen["n_epochs"],
            "batch_size": chosen["batch_size"],
            "learning_rate": _DEFAULTS.learning_rate * chosen["learning_rate_multiplier"],
            "seed": request["seed"],
        },
        "constraints": supervised["constraints"],
        "lora": {"target_modules": "all-linear"},  # what constraints cover by default, and more
        # Jobs that an earlier version accepted name nothing.
        "screening": supervised.get("screening", {}),
        "restore": {"batch_size": _shared(_RESTORE.batch_size, supervised["workers"])},
        "distributed": {
            "workers": supervised["workers"],
            "zero_stage": supervised["zero_stage"],
        },
        "output": output,
    }
    try:
        return FinetuneSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {message}" if where else message) from None


def _shared(rows: int, workers: int) -> int:
    """At least so many rows, and as many for each worker."""
    return -(-rows // workers) * workers


def accepted(request: CreateJob, policy: Policy, offer: BaseModelOffer) -> dict[str, Any]:
    """What is kept of a request: all of it, with nothing left to defaults that may change.

    Raises:
        InputError: the policy forbids it, or its settings do not fit together.
    """
    configs = constraints_of(request, policy)
    _require_own_rows(request, policy)
    supervised = request.method.supervised
    kept = {
        "hyperparameters": hyperparameters_of(request),
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": hyperparameters_of(request),
                "constraints": [_plain(config) for config in configs],
                "workers": supervised.workers,
                "zero_stage": supervised.zero_stage,
                "safety_rows": supervised.safety_rows,
                "answer_rows": supervised.answer_rows,
                "screening": {
                    "on_risk": on_risk_of(request, policy),
                    "policy": supervised.screening.policy.model_dump(exclude_none=True),
                },
            },
        },
        "metadata": request.metadata,
        "seed": request.seed or 0,
        "suffix": request.suffix,
    }
    nowhere = Path("/nowhere")
    finetune_spec(kept, name="check", offer=offer, train=nowhere, validation=None, output=nowhere)
    return kept


def _plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON that makes the same one again."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}

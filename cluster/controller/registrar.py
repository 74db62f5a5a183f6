"""Keeps the serving pools in step with the database: what is published is served, what is deleted
is not, what is quarantined is restored, and a model's `state` is its gate's.

It looks at what is, not at what happened, so nothing is lost when any part was down. Every
controller may run one: to register or retire what another just did changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from cluster.controller.restorer import Restorer
from cluster.job_request import on_quarantine
from cluster.provenance import ProvenanceError, PublicKey, Signed, Statement
from cluster.serving.client import Admin, Refused
from cluster.serving.front import ADMIN_TOKEN
from cluster.serving.registry import ADAPTER_FILES
from cluster.settings import Settings
from cluster.state import Database
from cluster.state.models import Job, PublishedModel
from safeft.errors import SafeftError

log = logging.getLogger(__name__)
LOOK_EVERY_S = 5.0
_LONGEST_BACKOFF_S = 300.0
NOT_SERVED = "not_served"
_ACTOR = "control plane"


class Registrar:
    """One loop over the pools of `settings.base_models`.

    Args:
        public_key: whose signature a model's provenance must have.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        public_key: PublicKey,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._database, self._key = settings, database, public_key
        self._clock, self._restorer = clock, Restorer(database)
        self._later: dict[str, tuple[float, float]] = {}  # refused model: not before, backoff
        self._said: dict[str, str] = {}

    def run(self, stop: threading.Event) -> None:
        """Look until `stop` is set."""
        while not stop.is_set():
            try:
                self.look()
            except Exception:
                log.exception("a round of the registrar failed; the next one comes")
            stop.wait(LOOK_EVERY_S)

    def look(self) -> None:
        """One round. A pool that does not answer is asked again in the next one."""
        for base, offer in self._settings.base_models.items():
            if offer.serving is None:
                continue
            try:
                token = (self._settings.serving_state(base) / ADMIN_TOKEN).read_text().strip()
                self._look(base, Admin(offer.serving, token))
                self._said.pop(base, None)
            except (SafeftError, SQLAlchemyError, OSError) as error:
                self._say(base, f"{base} is not kept in step with serving: {error}")

    def _look(self, base: str, pool: Admin) -> None:
        records = pool.get("models")
        served = {row["model"]: row["state"] for row in records}  # the newest is last
        with self._database.system_read() as session:
            rows = session.execute(
                select(
                    PublishedModel.id,
                    PublishedModel.kind,
                    PublishedModel.state,
                    PublishedModel.deleted_at,
                ).where(PublishedModel.base_model == base)
            ).all()
        states, missing = {}, []
        for model, kind, state, deleted_at in rows:
            if deleted_at is not None:
                if model in served:
                    self._retire(pool, model)
                continue
            found = served.get(model) if kind == "adapter" else NOT_SERVED
            if found is None:
                missing.append(model)
            elif found != state:
                states[model] = found
        self._keep(states)
        for model in missing:
            self._register(pool, model)
        self._restorer.look(records, pool, lambda model: self._register(pool, model))

    def _register(self, pool: Admin, model: str) -> None:
        """Have a model served; one that is refused is tried again after a while.

        Raises:
            InputError: the pool does not answer in time: then it is no use to go on.
        """
        not_before, backoff = self._later.get(model, (0.0, LOOK_EVERY_S))
        if self._clock() < not_before:
            return
        self._later[model] = self._clock() + backoff, min(_LONGEST_BACKOFF_S, 2 * backoff)
        try:
            pool.post("models", model=model, **self._what(model))
        except (Refused, ProvenanceError) as error:
            log.warning("%s is not served yet: %s", model, error)
            return
        del self._later[model]
        log.info("%s is registered with serving", model)

    def _what(self, model: str) -> dict[str, Any]:
        """What its pool must know of a model, as its publisher signed it.

        Raises:
            ProvenanceError: the signature, or the model's name, is another.
        """
        with self._database.system_read() as session:
            row, request = session.execute(
                select(PublishedModel, Job.request)
                .join(Job, Job.id == PublishedModel.job_id)
                .where(PublishedModel.id == model)
            ).one()
        try:
            signed = Signed.model_validate(row.provenance)
            self._key.check(signed)
            statement = Statement.model_validate_json(signed.statement)
        except ValidationError as error:
            raise ProvenanceError(
                f"its provenance cannot be read ({error.error_count()} errors)"
            ) from None
        if statement.model != model:
            raise ProvenanceError(f"its provenance is that of {statement.model}")
        return {
            "artifact": {
                "prefix": row.prefix,
                "files": {name: statement.files.get(name, "") for name in ADAPTER_FILES},
                "base_weights": statement.base_weights,
            },
            "on_quarantine": on_quarantine(request["metadata"]),
        }

    def _retire(self, pool: Admin, model: str) -> None:
        pool.post("decisions", action="retire", model=model, reason="deleted", actor=_ACTOR)
        log.info("%s was deleted: it is served no longer", model)

    def _keep(self, states: dict[str, str]) -> None:
        """Write the states that changed, unless the model was deleted meanwhile."""
        if not states:
            return
        with self._database.system() as session:
            for model, state in states.items():
                session.execute(
                    update(PublishedModel)
                    .where(PublishedModel.id == model, PublishedModel.deleted_at.is_(None))
                    .values(state=state)
                )

    def _say(self, base: str, message: str) -> None:
        """Log it, once for as long as it is the same."""
        if self._said.get(base) != message:
            self._said[base] = message
            log.warning("%s", message)

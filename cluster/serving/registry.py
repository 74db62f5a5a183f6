"""Which names are served, and where the weights behind them lie. In the gate's database."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

_tables = sa.MetaData()
_locations = sa.Table(
    "served_weights",
    _tables,
    sa.Column("weights", sa.String(64), primary_key=True),
    sa.Column("location", sa.Text, nullable=False),
)


@dataclass(frozen=True)
class BaseModel:
    """The one base model of a serving pool.

    Attributes:
        source: as `safeft.models.resolve` takes it.
        name: under which tenants may ask for it without an adapter.
        weights: its hash.
    """

    source: str
    name: str
    weights: str


class Registry:
    """Adapter hash -> directory. One process writes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        _tables.create_all(engine)

    def put(self, weights: str, location: Path) -> None:
        """Remember where an adapter lies; the same adapter elsewhere takes the place."""
        with self._engine.begin() as connection:
            connection.execute(_locations.delete().where(_locations.c.weights == weights))
            connection.execute(_locations.insert().values(weights=weights, location=str(location)))

    def get(self, weights: str) -> Path | None:
        """Where an adapter lies; None for one that was never put."""
        query = sa.select(_locations.c.location).where(_locations.c.weights == weights)
        with self._engine.connect() as connection:
            found = connection.execute(query).scalar()
        return None if found is None else Path(found)

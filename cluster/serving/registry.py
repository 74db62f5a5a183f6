"""Which names are served, and where the weights behind them lie. In the gate's database."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from cluster.artifacts.store import check_key
from safeft.errors import InputError

#: What an engine reads of a published adapter.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_tables = sa.MetaData()
_locations = sa.Table(
    "served_weights",
    _tables,
    sa.Column("weights", sa.String(64), primary_key=True),
    sa.Column("location", sa.Text, nullable=False),
)
_published = sa.Table(
    "published_weights",
    _tables,
    sa.Column("weights", sa.String(64), primary_key=True),
    sa.Column("model", sa.String(255), primary_key=True),
    sa.Column("prefix", sa.String(255), nullable=False),
    sa.Column("files", sa.Text, nullable=False),
)

_base = sa.Table("served_base", _tables, sa.Column("weights", sa.String(64), primary_key=True))


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


@dataclass(frozen=True)
class Published:
    """A published adapter in the artifact store.

    Attributes:
        prefix: of its keys there.
        files: SHA-256 of each of `ADAPTER_FILES`, as they were published.

    Raises:
        InputError: a file is missing, or what is given is no key or no hash.
    """

    prefix: str
    files: dict[str, str]

    def __post_init__(self) -> None:
        if set(self.files) != set(ADAPTER_FILES):
            raise InputError(f"artifact.files: must be {' and '.join(ADAPTER_FILES)}, with hashes")
        try:
            for name in self.files:
                check_key(self.key(name))
        except ValueError as error:
            raise InputError(f"artifact.prefix: {error}") from None
        for name, sha256 in self.files.items():
            if not _SHA256.fullmatch(sha256):
                raise InputError(f"artifact.files: {name} has no SHA-256 in lower-case hex")

    def key(self, name: str) -> str:
        """Of one of its files."""
        return f"{self.prefix}/{name}"

    @property
    def id(self) -> str:
        """The same for the same bytes, wherever they lie."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


class Registry:
    """Adapter hash -> directory, or artifact. One process writes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        _tables.create_all(engine)

    def put(self, model: str, weights: str, location: Path | Published) -> None:
        """Remember where an adapter lies.

        The same adapter in another directory takes the place; as another model's artifact, it is
        kept beside, because each of them may be deleted.
        """
        row: dict[str, str] = {"weights": weights}
        if isinstance(location, Published):
            table, key = _published, {"weights": weights, "model": model}
            row |= key | {"prefix": location.prefix, "files": json.dumps(location.files)}
        else:
            table, key = _locations, {"weights": weights}
            row |= {"location": str(location)}
        with self._engine.begin() as connection:
            same = [table.c[name] == value for name, value in key.items()]
            connection.execute(table.delete().where(*same))
            connection.execute(table.insert().values(**row))

    def forget(self, model: str) -> None:
        """A model is gone, and its artifact with it."""
        with self._engine.begin() as connection:
            connection.execute(_published.delete().where(_published.c.model == model))

    def base(self) -> str | None:
        """The base weights on which everything here was judged; None: nobody said so yet."""
        with self._engine.connect() as connection:
            return connection.execute(sa.select(_base.c.weights)).scalar()

    def set_base(self, weights: str) -> None:
        """From now on everything is judged on these base weights."""
        with self._engine.begin() as connection:
            connection.execute(_base.delete())
            connection.execute(_base.insert().values(weights=weights))

    def directory(self, model: str, weights: str) -> Path | None:
        """Where an adapter lies that was added by hand; None for every other one."""
        published = sa.select(_published.c.model).where(
            _published.c.weights == weights, _published.c.model == model
        )
        directory = sa.select(_locations.c.location).where(
            _locations.c.weights == weights, ~published.exists()
        )
        with self._engine.connect() as connection:
            found = connection.execute(directory).scalar()
        return None if found is None else Path(found)

    def get(self, weights: str) -> Path | Published | None:
        """Where an adapter lies; None for one that was never put."""
        artifact = sa.select(_published).where(_published.c.weights == weights).limit(1)
        directory = sa.select(_locations.c.location).where(_locations.c.weights == weights)
        with self._engine.connect() as connection:
            if (row := connection.execute(artifact).one_or_none()) is not None:
                return Published(row.prefix, json.loads(row.files))
            found = connection.execute(directory).scalar()
        return None if found is None else Path(found)

"""The one place where rows of one tenant are kept from the others.

Every query of a `TenantSession` is narrowed to its tenant before it is sent, whoever wrote it;
what cannot be narrowed (plain SQL) is refused, and nothing of another tenant can be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import (
    CTE,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    Executable,
    Result,
    Select,
    SelectBase,
    TextClause,
    UpdateBase,
    bindparam,
    event,
    inspect,
)
from sqlalchemy.orm import LoaderCriteriaOption, ORMExecuteState, Session, with_loader_criteria
from sqlalchemy.sql import visitors
from sqlalchemy.sql.operators import custom_op

from cluster.state.models import Base, Tenant, TenantOwned

_OWNER = "owner_"
_OWNER_COLUMN: dict[Any, ColumnElement[str]] = {
    mapper.local_table: mapper.local_table.c["id" if mapper.class_ is Tenant else "tenant_id"]
    for mapper in Base.registry.mappers
    if issubclass(mapper.class_, (Tenant, TenantOwned))
}


#: Where a query keeps SQL of its writer's own.
_TEXTS = ("_prefixes", "_suffixes", "_hints", "_statement_hints")


def _has_own_sql(statement: Executable) -> bool:
    """It holds SQL as text: `1=1 OR 1=1` beside a condition on the tenant would undo it."""
    assert isinstance(statement, ClauseElement)
    return any(getattr(statement, name, ()) for name in _TEXTS) or any(
        isinstance(part, TextClause)
        or (isinstance(part, ColumnClause) and part.is_literal and part.name != "*")
        or isinstance(getattr(part, "operator", None), custom_op)
        for part in visitors.iterate(statement)
    )


@dataclass(frozen=True)
class Narrowed:
    """A query of columns that was narrowed once, for requests that come often.

    What a session narrows at each execution takes several times as long as the query itself.
    """

    statement: Select[Any]


def narrowed(query: Select[Any]) -> Narrowed:
    """`query` with the condition that every table's rows are the session's tenant's.

    Raises:
        PermissionError: it has SQL as text, a subquery, a join or an alias, or a table that belongs
            to no tenant: it cannot be narrowed in this simple way.
    """
    nested = (SelectBase, UpdateBase, CTE)
    inside = [part for part in visitors.iterate(query) if isinstance(part, nested)]
    tables = query.get_final_froms()
    if inside != [query] or not tables or _has_own_sql(query):
        raise PermissionError("a query that is narrowed once reads tables, and has none inside")
    for table in tables:
        if table not in _OWNER_COLUMN:
            raise PermissionError(f"rows of {table} belong to no tenant, or are not read as such")
        query = query.where(_OWNER_COLUMN[table] == bindparam(_OWNER))
    return Narrowed(query)


class TenantSession(Session):
    """A session that sees and writes rows of one tenant only."""

    def __init__(self, tenant_id: str, **options: Any) -> None:
        assert tenant_id, "a tenant session needs a tenant"
        super().__init__(**options)
        self.tenant_id = tenant_id

    @cached_property
    def narrowed(self) -> tuple[LoaderCriteriaOption, ...]:
        """What keeps a query of objects to the tenant's rows."""
        tenant_id = self.tenant_id
        return (
            with_loader_criteria(
                TenantOwned, lambda cls: cls.tenant_id == tenant_id, include_aliases=True
            ),
            with_loader_criteria(Tenant, lambda cls: cls.id == tenant_id, include_aliases=True),
        )

    def insert(self, rows: Sequence[TenantOwned]) -> None:
        """Insert whole new rows of one kind at once, and keep no hold of them: quicker than add
        and flush."""
        if not rows:
            return
        table = inspect(type(rows[0])).local_table
        for row in rows:
            self.check_owner(row)
        values = [
            {column.key: getattr(row, column.key) for column in table.columns} for row in rows
        ]
        self.connection().execute(table.insert(), values)

    def rows(self, query: Narrowed, **values: Any) -> Result[Any]:
        """The rows of a query that was narrowed before, with values for its parameters."""
        self.flush()  # they may be among what was changed here
        return self.connection().execute(query.statement, {**values, _OWNER: self.tenant_id})

    def check_owner(self, row: object) -> None:
        """Raise PermissionError unless the row is this tenant's."""
        owner = row.id if isinstance(row, Tenant) else getattr(row, "tenant_id", None)
        if not isinstance(row, (TenantOwned, Tenant)) or owner != self.tenant_id:
            raise PermissionError(f"not a row of this tenant: {type(row).__name__}")


@event.listens_for(TenantSession, "do_orm_execute")
def _narrow(state: ORMExecuteState) -> None:
    session = state.session
    assert isinstance(session, TenantSession)
    mappers = state.all_mappers
    if not state.is_orm_statement or not mappers:
        raise PermissionError("a tenant's session takes ORM statements with entities only")
    if _has_own_sql(state.statement):
        raise PermissionError("a tenant's session takes no SQL as text")
    if state.is_insert or state.is_update:
        raise PermissionError("a tenant's session writes rows as objects: their owner is looked at")
    for mapper in mappers:
        if not issubclass(mapper.class_, (TenantOwned, Tenant)):
            raise PermissionError(f"{mapper.class_.__name__} rows belong to no tenant")
    state.statement = state.statement.options(*session.narrowed)


@event.listens_for(TenantSession, "before_flush")
def _own_rows_only(session: TenantSession, *_: Any) -> None:
    for row in (*session.new, *session.dirty, *session.deleted):
        session.check_owner(row)

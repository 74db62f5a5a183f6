"""The one place where rows of one tenant are kept from the others.

Every query of a `TenantSession` is narrowed to its tenant before it is sent, whoever wrote it;
what cannot be narrowed (plain SQL) is refused, and nothing of another tenant can be written.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, insert, inspect
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from cluster.state.models import Tenant, TenantOwned


class TenantSession(Session):
    """A session that sees and writes rows of one tenant only."""

    def __init__(self, tenant_id: str, **options: Any) -> None:
        assert tenant_id, "a tenant session needs a tenant"
        super().__init__(**options)
        self.tenant_id = tenant_id
        self.narrowed = (
            with_loader_criteria(
                TenantOwned, lambda cls: cls.tenant_id == tenant_id, include_aliases=True
            ),
            with_loader_criteria(Tenant, lambda cls: cls.id == tenant_id, include_aliases=True),
        )

    def insert(self, row: TenantOwned) -> None:
        """Insert a whole new row at once, and keep no hold of it: quicker than add and flush."""
        self.check_owner(row)
        columns = inspect(type(row)).columns
        values = {column.key: getattr(row, column.key) for column in columns}
        self.connection().execute(insert(type(row)), values)

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

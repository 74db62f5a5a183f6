"""What alembic runs: on the connection, and in the transaction, that `Database.migrate` opened."""

from __future__ import annotations

from alembic import context

from cluster.state.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()

"""When a stage was last seen to go on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("stages", sa.Column("progressed_at", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("stages", "progressed_at")

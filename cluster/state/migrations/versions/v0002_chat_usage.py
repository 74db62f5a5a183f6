"""What tenants' requests to served models used, and how much they may."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "chat_usage",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("day", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.String(length=255), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("fk_chat_usage_tenant_id")
        ),
        sa.PrimaryKeyConstraint("tenant_id", "day", "model", name=op.f("pk_chat_usage")),
    )
    op.add_column("tenants", sa.Column("max_chat_tokens", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("tenants", "max_chat_tokens")
    op.drop_table("chat_usage")

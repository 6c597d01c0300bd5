"""Sessions: deltas under a name that ends by itself."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["downgrade", "upgrade"]

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    at = sa.ForeignKey("tenants.name", name="fk_sessions_tenant")
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(32)),
        sa.Column("tenant", sa.String(63), at, nullable=False),
        sa.Column("delta", sa.String(64), nullable=False),
        sa.Column("blob", sa.String(64), nullable=False),
        sa.Column("ttl_s", sa.Double, nullable=False),
        sa.Column("boot", sa.String(64), nullable=False),
        sa.Column("ends_s", sa.Double, nullable=False),
        sa.Column("expires_s", sa.Double, nullable=False),
        sa.Column("ended_s", sa.Double, nullable=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_revision", "sessions", ["revision"])
    op.create_index("ix_sessions_delta", "sessions", ["delta"])


def downgrade() -> None:
    """Drop the table, and with it all sessions."""
    op.drop_table("sessions")

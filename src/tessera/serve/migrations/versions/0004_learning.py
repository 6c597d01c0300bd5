"""Learning from feedback: policies, budgets, steps; and feedback by alias in the order it came."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["downgrade", "upgrade"]

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _tenant(table: str) -> sa.Column[str]:
    at = sa.ForeignKey("tenants.name", name=f"fk_{table}_tenant")
    return sa.Column("tenant", sa.String(63), at, nullable=False)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "learning",
        _tenant("learning"),
        sa.Column("alias", sa.String(128)),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("detector", sa.Text, nullable=False),
        sa.Column("change", sa.BigInteger, nullable=False),
        sa.Column("changed", sa.Integer, nullable=False),
        sa.Column("due", sa.Integer, nullable=False),
        sa.Column("fresh", sa.Integer, nullable=False),
        sa.Column("last_s", sa.Double, nullable=False),
        sa.Column("skipped", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "alias", name="pk_learning"),
    )
    op.create_table(
        "budgets",
        _tenant("budgets"),
        sa.Column("cap_ms", sa.Double, nullable=False),
        sa.Column("cap_joules", sa.Double, nullable=True),
        sa.Column("window_s", sa.Double, nullable=False),
        sa.Column("ms", sa.Double, nullable=False),
        sa.Column("joules", sa.Double, nullable=False),
        sa.Column("since_s", sa.Double, nullable=False),
        sa.Column("holder", sa.String(32), nullable=False),
        sa.Column("until_s", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_budgets"),
    )
    op.create_table(
        "learning_steps",
        sa.Column("tenant", sa.String(63)),
        sa.Column("alias", sa.String(128)),
        sa.Column("seq", sa.BigInteger, autoincrement=False),
        sa.PrimaryKeyConstraint("tenant", "alias", "seq", name="pk_learning_steps"),
    )
    op.create_index("ix_feedback_order", "feedback", ["tenant", "alias", "seq"])


def downgrade() -> None:
    """Drop the tables; the events of the log stay."""
    op.drop_index("ix_feedback_order", "feedback")
    for table in ("learning_steps", "budgets", "learning"):
        op.drop_table(table)

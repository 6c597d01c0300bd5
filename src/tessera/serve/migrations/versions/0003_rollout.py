"""Experiments, feedback, gates, watches, and where the answer to a request is in the log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["downgrade", "upgrade"]

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _tenant(table: str) -> sa.Column[str]:
    at = sa.ForeignKey("tenants.name", name=f"fk_{table}_tenant")
    return sa.Column("tenant", sa.String(63), at, nullable=False)


def upgrade() -> None:
    """Make the tables."""
    _answers()
    op.create_table(
        "experiments",
        _tenant("experiments"),
        sa.Column("alias", sa.String(128)),
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("incumbent", sa.String(64), nullable=False),
        sa.Column("candidate", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("share", sa.Integer, nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("started_s", sa.Double, nullable=False),
        sa.Column("ended_s", sa.Double, nullable=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "alias", name="pk_experiments"),
    )
    op.create_index("ix_experiments_revision", "experiments", ["revision"])
    _feedback()
    _gates()


def _answers() -> None:
    op.create_table(
        "answers",
        sa.Column("tenant", sa.String(63)),
        sa.Column("request", sa.String(128)),
        sa.Column("seq", sa.BigInteger, autoincrement=False),
        sa.PrimaryKeyConstraint("tenant", "request", "seq", name="pk_answers"),
    )
    sqlite = op.get_bind().dialect.name == "sqlite"
    request = "json_extract(body, '$.request')" if sqlite else "body::json ->> 'request'"
    op.execute(
        f"INSERT INTO answers (tenant, request, seq) SELECT tenant, {request}, seq FROM audit "
        f"WHERE kind = 'request' AND tenant <> '' AND {request} IS NOT NULL"
    )


def _feedback() -> None:
    op.create_table(
        "feedback",
        _tenant("feedback"),
        sa.Column("request", sa.String(128)),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("answered", sa.BigInteger, nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("delta", sa.String(64), nullable=False),
        sa.Column("experiment", sa.String(32), nullable=False),
        sa.Column("arm", sa.String(16), nullable=False),
        sa.Column("outcomes", sa.Text, nullable=False),
        sa.Column("said", sa.Text, nullable=False),
        sa.Column("received_s", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "request", name="pk_feedback"),
    )
    op.create_index("ix_feedback_experiment", "feedback", ["tenant", "experiment", "seq"])
    op.create_index("ix_feedback_alias", "feedback", ["tenant", "alias", "generation", "seq"])


def _gates() -> None:
    op.create_table(
        "gates",
        _tenant("gates"),
        sa.Column("id", sa.String(64)),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("incumbent", sa.String(64), nullable=False),
        sa.Column("candidate", sa.String(64), nullable=False),
        sa.Column("look", sa.Integer, nullable=False),
        sa.Column("tested", sa.Integer, nullable=False),
        sa.Column("passed", sa.Integer, nullable=False),
        sa.Column("decision", sa.Text, nullable=False),
        sa.Column("decided_s", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "id", name="pk_gates"),
    )
    op.create_index("ix_gates_alias", "gates", ["tenant", "alias", "seq"])
    op.create_table(
        "watches",
        _tenant("watches"),
        sa.Column("alias", sa.String(128)),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("delta", sa.String(64), nullable=False),
        sa.Column("gate", sa.String(64), nullable=False),
        sa.Column("correct", sa.BigInteger, nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("min_n", sa.Integer, nullable=False),
        sa.Column("margin", sa.Double, nullable=False),
        sa.Column("confidence", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "alias", name="pk_watches"),
    )


def downgrade() -> None:
    """Drop the tables; the events of the log stay."""
    for table in ("watches", "gates", "feedback", "experiments", "answers"):
        op.drop_table(table)

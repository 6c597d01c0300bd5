"""Tenants, keys, deltas, aliases with their history, and the audit chain."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["downgrade", "upgrade"]

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _tenant(table: str, *, required: bool = True) -> sa.Column[str]:
    at = sa.ForeignKey("tenants.name", name=f"fk_{table}_tenant")
    return sa.Column("tenant", sa.String(63), at, nullable=not required)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "head",
        sa.Column("id", sa.Integer),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_head"),
        sa.CheckConstraint("id = 1", name="ck_head_one"),
    )
    op.execute(f"INSERT INTO head (id, revision, seq, hash) VALUES (1, 0, 0, '{'0' * 64}')")
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63)),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("max_deltas", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64)),
        _tenant("keys", required=False),
        sa.Column("scopes", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("revoked_s", sa.Double, nullable=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("digest", name="uq_keys_digest"),
    )
    op.create_table(
        "deltas",
        _tenant("deltas"),
        sa.Column("hash", sa.String(64)),
        sa.Column("blob", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("base_hash", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("parent", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "hash", name="pk_deltas"),
    )
    _aliases()
    op.create_table(
        "audit",
        sa.Column("seq", _SEQ, autoincrement=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("time_s", sa.Double, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
    )
    op.create_index("ix_keys_revision", "keys", ["revision"])
    op.create_index("ix_deltas_hash", "deltas", ["hash"])
    op.create_index("ix_aliases_revision", "aliases", ["revision"])
    op.create_index("ix_audit_tenant", "audit", ["tenant", "seq"])
    op.create_index("ix_audit_time", "audit", ["time_s"])


def _aliases() -> None:
    op.create_table(
        "aliases",
        _tenant("aliases"),
        sa.Column("name", sa.String(128)),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("delta", sa.String(64), nullable=False),
        sa.Column("changed_s", sa.Double, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", name="pk_aliases"),
    )
    op.create_table(
        "alias_history",
        _tenant("alias_history"),
        sa.Column("name", sa.String(128)),
        sa.Column("generation", sa.BigInteger),
        sa.Column("delta", sa.String(64), nullable=False),
        sa.Column("changed_s", sa.Double, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("restored", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", "generation", name="pk_alias_history"),
    )


def downgrade() -> None:
    """Drop the tables, and with them all that was registered."""
    for table in ("audit", "alias_history", "aliases", "deltas", "keys", "tenants", "head"):
        op.drop_table(table)

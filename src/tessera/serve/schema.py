"""The tables, alike on SQLite and PostgreSQL. A change here needs a new file in migrations/."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

__all__ = [
    "alias_history",
    "aliases",
    "audit",
    "deltas",
    "head",
    "keys",
    "metadata",
    "sessions",
    "tenants",
]

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

_SEQ = BigInteger().with_variant(Integer(), "sqlite")


def _tenant(*, key: bool = False, required: bool = True) -> Column[str]:
    at = ForeignKey("tenants.name")
    return Column("tenant", String(63), at, primary_key=key, nullable=not required)


# One row. Whoever changes anything locks it first, so changes have one order in all processes.
head = Table(
    "head",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="one"), primary_key=True),
    Column("revision", BigInteger, nullable=False),  # of the state: tenants, keys, deltas, aliases
    Column("seq", BigInteger, nullable=False),  # of the last event
    Column("hash", String(64), nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("created_s", Double, nullable=False),
    Column("max_deltas", Integer, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    _tenant(required=False),
    Column("scopes", String(64), nullable=False),  # sorted, with blanks between
    Column("digest", String(64), nullable=False, unique=True),  # sha256 of the secret
    Column("created_s", Double, nullable=False),
    Column("revoked_s", Double, nullable=True),
    Column("revision", BigInteger, nullable=False),
    Index("ix_keys_revision", "revision"),
)

deltas = Table(
    "deltas",
    metadata,
    _tenant(key=True),
    Column("hash", String(64), primary_key=True),
    Column("blob", String(64), nullable=False),  # sha256 of its file
    Column("kind", String(32), nullable=False),
    Column("base_hash", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("parent", String(64), nullable=False),
    Index("ix_deltas_hash", "hash"),
)

aliases = Table(
    "aliases",
    metadata,
    _tenant(key=True),
    Column("name", String(128), primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("delta", String(64), nullable=False),
    Column("changed_s", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Index("ix_aliases_revision", "revision"),
)

alias_history = Table(
    "alias_history",
    metadata,
    _tenant(key=True),
    Column("name", String(128), primary_key=True),
    Column("generation", BigInteger, primary_key=True),
    Column("delta", String(64), nullable=False),
    Column("changed_s", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("restored", BigInteger, nullable=False),  # the generation it went back to; 0: forward
)

# Those that have ended stay while the log needs their deltas to compute answers again.
sessions = Table(
    "sessions",
    metadata,
    Column("id", String(32), primary_key=True),
    _tenant(),
    Column("delta", String(64), nullable=False),
    Column("blob", String(64), nullable=False),  # its own delta's file; "": one the tenant holds
    Column("ttl_s", Double, nullable=False),
    Column("boot", String(64), nullable=False),  # of the machine, on whose clock `ends_s` counts
    Column("ends_s", Double, nullable=False),
    Column("expires_s", Double, nullable=False),  # since 1970: for other boots and machines
    Column("ended_s", Double, nullable=True),
    Column("revision", BigInteger, nullable=False),
    Index("ix_sessions_revision", "revision"),
    Index("ix_sessions_delta", "delta"),
)

audit = Table(
    "audit",
    metadata,
    # "INTEGER PRIMARY KEY" is SQLite's own row number: one tree to write to instead of two.
    Column("seq", _SEQ, primary_key=True, autoincrement=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("time_s", Double, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("body", Text, nullable=False),  # canonical JSON: what was hashed, character by character
    Index("ix_audit_tenant", "tenant", "seq"),
    Index("ix_audit_time", "time_s"),
)

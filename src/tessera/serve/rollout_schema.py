"""The tables of rollouts: experiments, feedback, gates and watches; see `schema`."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, String, Table, Text

from tessera.serve.schema import metadata

__all__ = ["answers", "experiments", "feedback", "gates", "watches"]


def _tenant(*, key: bool = True) -> Column[str]:
    return Column("tenant", String(63), ForeignKey("tenants.name"), primary_key=key, nullable=False)


# Where in the audit log the answer to a request is. Written with its event, in one transaction.
answers = Table(
    "answers",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("request", String(128), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
)

# The last one of each alias; those before it are in the audit log.
experiments = Table(
    "experiments",
    metadata,
    _tenant(),
    Column("alias", String(128), primary_key=True),
    Column("id", String(32), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("incumbent", String(64), nullable=False),
    Column("candidate", String(64), nullable=False),
    Column("mode", String(16), nullable=False),
    Column("share", Integer, nullable=False),
    Column("salt", String(64), nullable=False),
    Column("started_s", Double, nullable=False),
    Column("ended_s", Double, nullable=True),
    Column("seq", BigInteger, nullable=False),  # of the event that began it
    Column("revision", BigInteger, nullable=False),
    Index("ix_experiments_revision", "revision"),
)

feedback = Table(
    "feedback",
    metadata,
    _tenant(),
    Column("request", String(128), primary_key=True),
    Column("seq", BigInteger, nullable=False),  # of its own event: its place in the order
    Column("answered", BigInteger, nullable=False),  # of the event of the answer
    Column("alias", String(128), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("delta", String(64), nullable=False),
    Column("experiment", String(32), nullable=False),
    Column("arm", String(16), nullable=False),
    Column("outcomes", Text, nullable=False),  # a 1 or 0 a row of the request; "": none is known
    Column("said", Text, nullable=False),  # canonical JSON of what was sent
    Column("received_s", Double, nullable=False),
    Index("ix_feedback_experiment", "tenant", "experiment", "seq"),
    Index("ix_feedback_alias", "tenant", "alias", "generation", "seq"),
    Index("ix_feedback_order", "tenant", "alias", "seq"),
)

gates = Table(
    "gates",
    metadata,
    _tenant(),
    Column("id", String(64), primary_key=True),  # sha256 of the evidence, where its blob is
    Column("seq", BigInteger, nullable=False),
    Column("alias", String(128), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("incumbent", String(64), nullable=False),
    Column("candidate", String(64), nullable=False),
    Column("look", Integer, nullable=False),
    Column("tested", Integer, nullable=False),  # 0: too few examples to test anything
    Column("passed", Integer, nullable=False),
    Column("decision", Text, nullable=False),  # canonical JSON
    Column("decided_s", Double, nullable=False),
    Index("ix_gates_alias", "tenant", "alias", "seq"),
)

# What is to be rolled back where live accuracy falls; the last of each alias.
watches = Table(
    "watches",
    metadata,
    _tenant(),
    Column("alias", String(128), primary_key=True),
    Column("generation", BigInteger, nullable=False),  # that the promotion makes
    Column("delta", String(64), nullable=False),
    Column("gate", String(64), nullable=False),
    Column("correct", BigInteger, nullable=False),  # of the incumbent's, in the gate's evidence
    Column("n", BigInteger, nullable=False),
    Column("min_n", Integer, nullable=False),
    Column("margin", Double, nullable=False),
    Column("confidence", Double, nullable=False),
)

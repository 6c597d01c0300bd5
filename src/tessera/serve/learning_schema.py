"""The tables of learning: policies and how far each is, budgets, and which events are steps."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, String, Table, Text

from tessera.serve.schema import metadata

__all__ = ["budgets", "learning", "steps"]


def _tenant() -> Column[str]:
    at = ForeignKey("tenants.name")
    return Column("tenant", String(63), at, primary_key=True, nullable=False)


# Of each alias that learns. All but the policy follows from the feedback and the rounds so far.
learning = Table(
    "learning",
    metadata,
    _tenant(),
    Column("alias", String(128), primary_key=True),
    Column("policy", Text, nullable=False),  # canonical JSON
    Column("at", BigInteger, nullable=False),  # the last feedback that was looked at
    Column("generation", BigInteger, nullable=False),  # of the answers that the detector sees
    Column("detector", Text, nullable=False),  # its state as JSON; "": a new one
    Column("change", BigInteger, nullable=False),  # the first feedback after it; 0: there is none
    Column("changed", Integer, nullable=False),  # labelled examples since then
    Column("due", Integer, nullable=False),  # how many of them a round waits for
    Column("fresh", Integer, nullable=False),  # labelled examples since the last round
    Column("last_s", Double, nullable=False),  # of the last round, or of the policy
    Column("skipped", Text, nullable=False),  # why the last round was not run, said once
)

# Of each tenant: what its rounds may take in a window of time, and which process runs one.
budgets = Table(
    "budgets",
    metadata,
    _tenant(),
    Column("cap_ms", Double, nullable=False),
    Column("cap_joules", Double, nullable=True),
    Column("window_s", Double, nullable=False),
    Column("ms", Double, nullable=False),
    Column("joules", Double, nullable=False),
    Column("since_s", Double, nullable=False),
    Column("holder", String(32), nullable=False),  # of the claim; "": nobody
    Column("until_s", Double, nullable=False),
)

# Which events of the log are steps of which alias.
steps = Table(
    "learning_steps",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
)
